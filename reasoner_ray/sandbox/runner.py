"""Runs a program inside the sandbox, and notes the exception that ends it. The launcher executes its text there.

What it writes is the program's own word: the program can change anything here.
"""


def main() -> None:
    """Run ``program.py`` of the current folder as ``__main__``; exit with status 1 where it raises.

    The program is over where its text is: threads and exit handlers are not awaited, and the interpreter is not taken
    down, which would cost more time than many a program.
    """
    import builtins
    import json
    import os
    import sys
    import traceback

    spare = bytearray(8 << 20)  # given back when memory runs out, so that the error can still be told
    own, status = os.getpid(), 0
    world = globals()
    world.clear()
    world.update(__name__="__main__", __builtins__=builtins, __file__="program.py")
    try:
        with open("program.py", encoding="utf-8") as file:
            source = file.read()
        exec(compile(source, "program.py", "exec", dont_inherit=True), world)
    except SystemExit as error:
        code = error.code
        status = 0 if code is None else code & 255 if isinstance(code, int) else 1
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException as error:  # noqa: BLE001 (a program may raise anything)
        del spare
        if isinstance(error, MemoryError):  # what filled the memory is held by the program's names, global and local
            world.clear()
            traceback.clear_frames(error.__traceback__)
        status = 1
        # The last place in a file of the program itself, not in a library.
        line, text = None, ""
        for frame in traceback.extract_tb(error.__traceback__):
            if not os.path.isabs(frame.filename) and not frame.filename.startswith("<"):
                line, text = frame.lineno, frame.line or ""
        if isinstance(error, SyntaxError) and error.filename and not os.path.isabs(error.filename):
            line, text = error.lineno, ""  # its message shows the place
        name = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__
        message = "".join(traceback.format_exception_only(error)).strip()[-1500:]
        if text.strip():
            message += f" (line {line}: {text.strip()[:200]})"
        note = {"type": name, "message": message, "line": line, "errno": getattr(error, "errno", None)}
        if isinstance(error, RuntimeError) and "start new thread" in str(error):
            note["errno"] = 11
        if os.getpid() == own:  # else a fork of the program came back through here
            os.write(3, json.dumps(note, ensure_ascii=False).encode("utf-8", "replace"))  # not into a file: the folder may be full
            traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)  # without this file
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


main()

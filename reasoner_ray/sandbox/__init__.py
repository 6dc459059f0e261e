"""A sandbox for generated code: ``box.Sandbox`` runs programs, ``levels.isolation_level`` says how well they are shut in.

Three processes, each of which trusts the one before it:

    worker              has something to lose: ``box`` (many runs at once), ``program`` (one program, from text to result),
                        ``launcher`` (starts its launcher and talks to it), ``job`` (what the two say to each other)
    launcher            a clean interpreter without the worker's environment and descriptors, which forks itself for every
                        program: ``launch``; the fork shuts the program in (``confine``) and watches it (``supervise``,
                        ``processes``, ``folders``)
    program             runs generated text: ``runner``

What shuts it in, by ``levels`` the strongest that this machine allows: ``namespaces`` (a world in which nothing else exists),
``landlock`` (no files but a few), ``seccomp`` (no system calls that reach out), ``limits`` (memory, time, processes), over the
Linux calls of ``linux``. Read box, program, launch, confine, supervise, in this order.

Imports nothing, since the launcher is part of this package.
"""

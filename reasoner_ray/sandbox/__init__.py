"""A sandbox for generated code: ``box.Sandbox`` runs programs, ``levels.isolation_level`` says how well they are shut in.

Three processes: the worker, which has something to lose; its launcher (``launcher`` starts it, ``launch`` runs in it), a
clean interpreter that forks itself for every program; and the program, shut in by ``confine`` and watched by
``supervise``. Imports nothing, since the launcher is part of this package.
"""

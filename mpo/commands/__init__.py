"""The commands of ``mpo``, one module each: ``register`` describes the options, a function runs the command.

What a command needs is imported when it runs, so that ``mpo --help`` answers at once.
"""

"""Running a program that a model wrote where it can do no harm; needs nothing of rpo but UserError.

run          from outside: whether a program passes its tests
jail         namespaces, limits and the filter of system calls
harness      inside: the process that holds the program, and the one that tests it
"""

"""Running a program that a model wrote where it can do no harm; needs nothing of rpo but UserError.

replies      the program that a model's reply contains
run          from outside: whether a program passes its tests
jail         namespaces and limits
syscalls     which system calls it may make
harness      inside: the process that holds the program, and the one that tests it
"""

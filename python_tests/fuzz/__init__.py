"""Random calls of the native kernels, held against the reference path; and calls that make no sense.

    make fuzz [FUZZ_ARGS="--seed 0 --calls 20000 --malformed 5000 --only bbb_conv2d,lrt_conv2d"]
    make fuzz FUZZ_ARGS="--case 0:1234"             # one case again, as a failure prints it

A case is two numbers, seed and index, from which everything else follows (choices.py). valid.py draws calls
that must work: ops, layers and models over dtypes, layouts, modes and gradients (arguments.py, operands.py);
bounds.py says by how much the two implementations may differ. malformed.py draws calls that must raise, or
agree. runner.py runs them in processes of their own, so that a crash or a hang is one failure among others.
"""

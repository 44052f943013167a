"""The ways through a network, each on its own."""

from fishopt.passes import Arguments, coverage_of
from fishopt.passes.coverage import CALL, RULE
from fishopt.passes.functional import FunctionalPass
from fishopt.passes.rowwise import RowwisePass
from fishopt.passes.traced import TracedPass


def ways(shadow, inputs):
    return coverage_of(shadow, Arguments(inputs)).ways


def is_ruled(shadow, inputs, names):
    return all(ways(shadow, inputs)[name] == RULE for name in names)


def is_traced(shadow, inputs, names):
    return all(ways(shadow, inputs)[name] in (RULE, CALL) for name in names)


def traced(shadow, inputs, names):
    inputs = Arguments(inputs)
    return TracedPass(shadow, inputs, names, coverage_of(shadow, inputs).trace)


def functional(shadow, inputs, names):
    return FunctionalPass(shadow, Arguments(inputs), names)


def rowwise(shadow, inputs, names):
    return RowwisePass(shadow, Arguments(inputs), names)

"""Which policy a migration follows."""

from sterna.migration.convergence.adaptive import Adaptive
from sterna.migration.convergence.deadline import Deadline
from sterna.migration.convergence.fixed import Fixed
from sterna.migration.convergence.policy import Policy
from sterna.migration.parameters import Parameters, PolicyName


def choose(parameters: Parameters) -> Policy:
    """The policy that `x-sterna-policy` names."""
    match parameters.policy:
        case PolicyName.FIXED:
            return Fixed(parameters)
        case PolicyName.DEADLINE:
            return Deadline(parameters.deadline_seconds)
        case PolicyName.ADAPTIVE:
            return Adaptive()

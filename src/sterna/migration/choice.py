"""Which policy a migration follows."""

from sterna.migration.parameters import Parameters, PolicyName
from sterna.migration.policies.adaptive import Adaptive
from sterna.migration.policies.deadline import Deadline
from sterna.migration.policies.fixed import Fixed
from sterna.migration.policy import Policy


def choose(parameters: Parameters) -> Policy:
    """The policy that `x-sterna-policy` names."""
    match parameters.policy:
        case PolicyName.FIXED:
            return Fixed(parameters)
        case PolicyName.DEADLINE:
            return Deadline(parameters.deadline_seconds)
        case PolicyName.ADAPTIVE:
            return Adaptive()

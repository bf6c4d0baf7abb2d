"""What plugin authors run on their own plugin: contracts, cache laws, and a toy model to run them on."""

from cmr.testing.contracts import Contracts, Finding, check
from cmr.testing.laws import Broken, CacheLaws
from cmr.testing.toy import ToyModel

__all__ = ["Broken", "CacheLaws", "Contracts", "Finding", "ToyModel", "check"]

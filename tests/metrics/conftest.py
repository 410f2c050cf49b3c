"""The PyTorch package torch-fidelity 0.4.0, which our figures are compared with; launch/test.sh installs it.

Without it the tests that need it are skipped, or fail where DIT_JAX_REQUIRE_ALL_TESTS is set, as in .ci/run.
"""

import os
import sys
import types

import pytest


@pytest.fixture(scope="session")
def fidelity():
    """Returns the package. It imports torchvision, which has no build for CPUs alone, for data sets and networks."""
    vision, datasets, transforms = (types.ModuleType(f"torchvision{name}") for name in ("", ".datasets", ".transforms"))
    functional = types.ModuleType("torchvision.transforms.functional")
    vision.datasets, vision.transforms, transforms.functional = datasets, transforms, functional
    datasets.CIFAR10 = datasets.CIFAR100 = datasets.STL10 = object
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, os.path.join(sys.prefix, "torch_fidelity")])
        for module in (vision, datasets, transforms, functional):
            patch.setitem(sys.modules, module.__name__, module)
        try:
            import torch_fidelity
        except ImportError as error:
            reason = f"torch-fidelity is missing ({error}); launch/test.sh fetches it where there is a network"
            (pytest.fail if os.environ.get("DIT_JAX_REQUIRE_ALL_TESTS") else pytest.skip)(reason)
    return torch_fidelity

"""Which names adapters use, and how many calls a step passes on its way to the product with W."""

import ast
import dis
import importlib
import sys
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

import spectral_core as sc

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "spectral_core", *sorted((ROOT / "adapters").glob("spectral_*"))]
OPEN_MODULES = {"engine", "errors", "numba"}  # of the core, and its public names

# What an adapter may use of the core


class Violations(ast.NodeVisitor):
    """Collect what a source file uses of the core that it must not use.

    Imports are checked, and so are attributes of imported modules, such as ``sc._power``.
    """

    def __init__(self, source):
        self.found = []
        self._modules = {}  # local name: the core's module that it stands for
        tree = ast.parse(source)
        for node in ast.walk(tree):  # all imports first: functions may precede them
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._check_import(node)
        self.visit(tree)

    def _check_import(self, node):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "spectral_core":
                    self._check_path(alias.name)
                    bound = alias.asname or "spectral_core"
                    self._modules[bound] = alias.name if alias.asname else "spectral_core"
            return
        if node.level or (node.module or "").partition(".")[0] != "spectral_core":
            return
        for alias in node.names:
            path = f"{node.module}.{alias.name}"
            self._check_path(path)
            if path.removeprefix("spectral_core.") in OPEN_MODULES:
                self._modules[alias.asname or alias.name] = path

    def _check_path(self, path):
        """Record ``path`` unless it is a public name of the core or of an open module."""
        _, *names = path.split(".")
        if not names:
            return
        if names[0] in OPEN_MODULES:
            module = importlib.import_module(f"spectral_core.{names[0]}")
            offered = set(getattr(module, "__all__", vars(module)))
            is_public = len(names) < 2 or (names[1] in offered and not names[1].startswith("_"))
        else:
            is_public = names[0] in {*sc.__all__, "__version__"}
        if not is_public:
            self.found.append(path)

    def visit_Attribute(self, node):
        names, inner = [], node
        while isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in self._modules:
            self._check_path(".".join([self._modules[inner.id], *names]))
        else:
            self.generic_visit(node)

    def visit_Constant(self, node):
        """Check names of modules in strings, as `importlib.import_module` reads them."""
        if isinstance(node.value, str) and node.value.startswith("spectral_core."):
            names = node.value.split(".")
            if all(map(str.isidentifier, names)):
                self._check_path(node.value)


def sources(folder):
    return sorted(folder.rglob("*.py"))


ADAPTER_FILES = [path for folder in PACKAGES[1:] for path in sources(folder)]


@pytest.mark.parametrize("path", ADAPTER_FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_adapter_uses_public_names_of_the_core_alone(path):
    assert Violations(path.read_text()).found == []


FORBIDDEN = {
    "from spectral_core._power import left_rows": "_power.left_rows",
    "import spectral_core._power": "_power",
    "from spectral_core import _power": "_power",
    "from spectral_core import absent": "absent",
    "import spectral_core as sc\nsc._power.left_rows": "_power.left_rows",
    "def f():\n  return sc._plan\nimport spectral_core as sc": "_plan",
    "import spectral_core\nspectral_core.numba._x": "numba._x",
    "from spectral_core.engine import absent": "engine.absent",
    "from spectral_core.engine import _divide": "engine._divide",
    "from spectral_core.engine import *": "engine.*",
    "from spectral_core import engine\nengine._divide": "engine._divide",
    "import spectral_core.engine as e\ne.absent": "engine.absent",
    "from spectral_core.numba.kernels import run": "numba.kernels.run",
    "import_module('spectral_core._plan')": "_plan",
}
ALLOWED = [
    "from spectral_core import init, errors, __version__",
    "from spectral_core.engine import Job, dispatch",
    "from spectral_core.numba import NumbaEngine",
    "from spectral_core.errors import check_int",
    "import spectral_core as sc\nsc.engine.Job\nsc.init({}).v",
    "from ._power import anything\nimport numpy\nnumpy._core",
    "'spectral_core.numba is compiled'",
]


@pytest.mark.parametrize("source", FORBIDDEN)
def test_checker_finds_private_names(source):
    assert Violations(source).found == [f"spectral_core.{FORBIDDEN[source]}"]


@pytest.mark.parametrize("source", ALLOWED)
def test_checker_accepts_public_names(source):
    assert Violations(source).found == []


# Names of modules


def modules(folder):
    """Return the names of the modules and packages in a package's folder."""
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in folder.glob("*/__init__.py")}


def folders():
    return [init.parent for package in PACKAGES for init in sorted(package.rglob("__init__.py"))]


def bound_names(path):
    """Return the names that a package's ``__init__`` binds, but for its modules."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and not node.module:
            continue  # from . import module
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("folder", folders(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_public_name_shadows_a_module(folder):
    assert not bound_names(folder / "__init__.py") & modules(folder)


def differ_by_a_letter(one, other):
    """Return True if one edit makes the names equal: a letter more, less or another."""
    short, long = sorted((one, other), key=len)
    shorter = {long[:i] + long[i + 1 :] for i in range(len(long))}
    if len(short) < len(long):
        return short in shorter
    return one == other or sum(a != b for a, b in zip(one, other, strict=True)) == 1


@pytest.mark.parametrize("folder", folders(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_two_modules_differ_by_a_letter(folder):
    names = sorted(name.strip("_") for name in modules(folder))
    assert [pair for pair in combinations(names, 2) if differ_by_a_letter(*pair)] == []


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("step", "steps", True),
        ("estimate", "estimator", False),
        ("plan", "plan", True),
        ("plan", "play", True),
        ("plan", "pln", True),
        ("select", "shard", False),
        ("power", "penalty", False),
        ("ab", "ba", False),
    ],
)
def test_edits_of_names_are_counted(one, other, expected):
    assert differ_by_a_letter(one, other) is expected


@pytest.mark.parametrize("path", sources(PACKAGES[0]), ids=lambda p: p.name)
def test_core_imports_no_framework(path):
    allowed = {*sys.stdlib_module_names, "numpy", "array_api_compat", "spectral_core"}
    if path.parent.name == "numba":
        allowed |= {"numba", "llvmlite"}
    if path.name == "_summary.py":
        allowed |= {"rich"}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.partition(".")[0])
    assert imported <= allowed


# The calls of a step, from the user's call or the hook to the product with W

MOST_FRAMES, MOST_CHANGES = 6, 2
PRODUCTS = {"matmul", "mv", "mm", "bmm", "addmv", "addmv_", "einsum", "tensordot", "dot_general"}
KERNELS = ROOT / "spectral_core/numba/kernels.py"  # its function `run` launches them


def multiplies(code):
    """Return True if the code of a function has a product of matrices, or launches a kernel."""
    if Path(code.co_filename) == KERNELS and code.co_name == "run":
        return True
    if not PRODUCTS.isdisjoint(code.co_names):
        return True
    return any(i.opname == "BINARY_OP" and i.argrepr == "@" for i in dis.get_instructions(code))


def package_of(code):
    """Return the package of ours that a function belongs to, or None."""
    path = Path(code.co_filename)
    for package in PACKAGES:
        if package in path.parents:
            return package.name
    return None


class Walk:
    """Record the deepest chain of our functions from a call to a function that multiplies.

    A profile does not see the operator ``@``, ufuncs and Numba's kernels. The functions that call
    them are known by their code.
    """

    def __init__(self, call):
        self.chain, self._kinds = [], {}
        sys.setprofile(self._profile)
        try:
            call()
        finally:
            sys.setprofile(None)

    @property
    def packages(self):
        return [package for package, _ in self.chain]

    @property
    def changes(self):
        """Number of changes of package."""
        return sum(a != b for a, b in pairwise(self.packages))

    def _kind(self, code):
        """Return the package of a function, and True if it is ours and multiplies."""
        if code not in self._kinds:
            package = package_of(code)
            self._kinds[code] = package, package is not None and multiplies(code)
        return self._kinds[code]

    def _profile(self, frame, event, _):
        if event != "call" or not self._kind(frame.f_code)[1]:
            return
        chain = []
        while frame is not None:
            package, _ = self._kind(frame.f_code)
            if package is not None:
                chain.insert(0, (package, frame.f_code.co_qualname))
            frame = frame.f_back
        if len(chain) > len(self.chain):
            self.chain = chain


def assert_short(step, *, compiled=False):
    """Walk through the first and the third step; ``compiled`` ones may run no Python later."""
    for number in range(3):
        if number == 1:
            step()
            continue
        walk = Walk(step)
        assert walk.chain or (compiled and number), "no product was seen"
        assert len(walk.chain) <= MOST_FRAMES, walk.chain
        assert walk.changes <= MOST_CHANGES, walk.chain


def arrays():
    rng = np.random.default_rng(0)
    shapes = {"dense": (30, 20), "conv": (8, 3, 3, 3)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return weights, {name: np.zeros_like(weight) for name, weight in weights.items()}


@pytest.mark.parametrize("layouts", [None, {"dense": "io", "conv": "hwio"}], ids=["oi", "io"])
@pytest.mark.parametrize("in_place", [True, False])
def test_walk_on_numpy(in_place, layouts):
    weights, grads = arrays()
    state = sc.init(weights, layouts=layouts)

    def step():
        nonlocal state
        if in_place:
            state = sc.add_gradient_(weights, grads, state)
        else:
            _, state = sc.add_gradient(weights, grads, state)

    assert_short(step)


def test_walk_on_numpy_with_numba():
    pytest.importorskip("numba", reason="Numba is not installed")
    from spectral_core.numba import NumbaEngine

    weights, grads = arrays()
    engines, state = [NumbaEngine()], sc.init(weights)
    sc.add_gradient_(weights, grads, state, engines=engines)  # compiles

    def step():
        nonlocal state
        state = sc.add_gradient_(weights, grads, state, engines=engines)

    assert_short(step)


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "numba"])
def test_walk_on_torch(kernels):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if kernels:
        pytest.importorskip("numba", reason="Numba is not installed")
    from torch import nn

    from spectral_torch import SpectralNormRegularizer

    def model():
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 3))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        SpectralNormRegularizer(net, kernels=kernels).attach(optimizer)

        def step():
            net(torch.ones(2, 1, 4, 4)).sum().backward()
            optimizer.step()

        return step

    model()()  # compiles
    assert_short(model())


def test_walk_on_jax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    pytest.importorskip("optax", reason="optax is not installed")
    import spectral_jax

    weights, grads = (jax.tree.map(jax.numpy.asarray, tree) for tree in arrays())
    layouts = {"dense": "oi", "conv": "oihw"}
    transformation = spectral_jax.add_spectral_norm_regularization(factor=0.01, layouts=layouts)
    state = transformation.init(weights)

    def step():
        nonlocal state
        _, state = transformation.update(grads, state, weights)

    assert_short(step, compiled=True)


def test_walk_counts_frames_and_changes_of_package(monkeypatch):
    """The check would fail for a longer walk."""
    walk = Walk(lambda: sc.power_iteration(np.eye(2), np.ones(2)))
    names = [name for _, name in walk.chain]
    assert names[0] == "power_iteration"
    assert Counter(walk.packages) == {"spectral_core": len(names)}
    assert walk.changes == 0
    monkeypatch.setitem(globals(), "MOST_FRAMES", len(names) - 1)
    with pytest.raises(AssertionError, match="power_iteration"):
        assert_short(lambda: sc.power_iteration(np.eye(2), np.ones(2)))
    with pytest.raises(AssertionError, match="no product"):
        assert_short(lambda: sc.as_matrix(np.eye(2), "oi"))

"""Layouts of convolutions whose norm is that of the map."""

import numpy as np
import pytest

import spectral_core as sc
from spectral_core._geometry import WAVES, Geometry, host_taps, settled, wave_of, with_operator_norm
from spectral_core._layout import plan_of


def test_stride_and_dilation_are_one_number_an_axis():
    layout = sc.Convolution("oihw", stride=2, dilation=(1, 3))
    assert layout.stride == (2, 2)
    assert layout.dilation == (1, 3)
    assert layout == sc.Convolution("oihw", stride=(2, 2), dilation=[1, 3])
    assert hash(layout) == hash(sc.Convolution("oihw", stride=(2, 2), dilation=(1, 3)))


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ("oi", {}, "0 kernel axes"),
        ("oikkkk", {}, "4 kernel axes"),
        ("oihw", {"stride": (1, 2, 3)}, "stride has 3 numbers for 2 axes"),
        ("oihw", {"stride": 0}, "stride"),
        ("oihw", {"dilation": "2"}, "dilation"),
        ("oihw", {"waves": 0}, "waves"),
    ],
)
def test_bad_options_are_refused(axes, options, message):
    with pytest.raises(sc.ArgumentError, match=message):
        sc.Convolution(axes, **options)


@pytest.mark.parametrize(
    ("shape", "stride"), [((4, 3, 1, 1), 1), ((4, 3, 1, 1), 2), ((4, 3, 2, 2), 2)]
)
def test_kernel_that_meets_each_sample_once_is_its_matrix(shape, stride):
    layout = sc.Convolution("oihw", stride=stride)
    assert wave_of(layout, shape) is None
    assert settled(layout, np.ones(shape), "w") == (sc.Layout("oihw"), None)


def test_kernel_axes_count_in_the_order_of_the_matrix():
    wave = wave_of(sc.Convolution("hwio", stride=(1, 2)), (3, 5, 2, 4))
    assert wave.sizes == (3, 5)
    assert wave.rows(plan_of("hwio", (3, 5, 2, 4), "w")) == (WAVES, 2 * 2 * 2 + 2)


def test_taps_of_a_strided_kernel_belong_to_classes():
    taps = host_taps(wave_of(sc.Convolution("oik", stride=2), (1, 1, 5)))
    assert taps.places[:, 0].tolist() == [0, 0, 1, 1, 2]
    assert taps.classes.tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]
    assert taps.steps[:, 0].tolist() == [-2, -1, 0, 1, 2]
    assert taps.pairs.sum(axis=0).tolist() == [1, 3, 5, 3, 1]


def test_dilation_counts_where_it_meets_a_stride():
    taps = host_taps(wave_of(sc.Convolution("oik", stride=2, dilation=3), (1, 1, 3)))
    assert taps.places[:, 0].tolist() == [0, 1, 3]
    plain = host_taps(wave_of(sc.Convolution("oik", dilation=3), (1, 1, 3)))
    assert plain.places[:, 0].tolist() == [0, 1, 2]


def test_transposed_convolution_exchanges_inputs_and_outputs():
    given = {"a": sc.Layout("(gi)ohw", 2), "b": sc.Layout("oi"), "c": sc.Layout("oik")}
    found, assumed = with_operator_norm(given, {"a": Geometry((2, 2), (1, 1), True)})
    assert found["a"] == sc.Convolution("(go)ihw", 2, stride=2)
    assert found["b"] is given["b"]
    assert found["c"] == sc.Convolution("oik")
    assert assumed == ["c"]


def test_complex_kernel_is_refused():
    with pytest.raises(sc.DTypeError, match="real"):
        sc.init({"w": np.ones((2, 2, 3), complex)}, layouts={"w": sc.Convolution("oik")})

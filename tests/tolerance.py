"""When two results agree: measured against the error that eager PyTorch makes in the same dtype."""

from contextlib import contextmanager

import torch

_EPS32 = torch.finfo(torch.float32).eps


def assert_close(name, got, exact, eager, magnitude=None):
    """`got` must be about as near to `exact` (float64) as `eager` is, of got's dtype.

    Element by element the error may be twice eager's largest plus a floor, and its root mean square
    twice eager's plus the floor's. The floor is one rounding of the result to its dtype (eps / 2
    of it) plus four roundings in fp32, the dtype of sums, of `magnitude`: the result of the same
    computation on absolute values, which is what rounding errors of a sum scale with. (Default:
    the exact result itself, for computations without cancellation.)
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, not {list(exact.shape)}"
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, not {eager.dtype}"
    assert not got.isnan().any(), f"{name}: NaN"
    assert exact.dtype == torch.float64
    if not got.numel():
        return
    magnitude = exact.abs() if magnitude is None else magnitude
    floor = torch.finfo(got.dtype).eps / 2 * exact.abs() + 2 * _EPS32 * magnitude
    error, eager_error = (got.double() - exact).abs(), (eager.double() - exact).abs()
    excess = error - floor
    allowed = 2 * eager_error.max()
    assert excess.max() <= allowed, (
        f"{name}: error {excess.max():.3g} over floor, eager {allowed / 2:.3g}"
    )
    allowed = 2 * _rms(eager_error) + _rms(floor)
    assert _rms(error) <= allowed, f"{name}: r.m.s. error {_rms(error):.3g}, allowed {allowed:.3g}"


def assert_same(got, expected, name="result"):
    """The same computation in another order: 32 roundings of the largest element at most."""
    assert got.shape == expected.shape, f"{name}: {list(got.shape)}, not {list(expected.shape)}"
    if not got.numel():
        return
    error = (got.double() - expected.double()).abs().max()
    allowed = 16 * torch.finfo(got.dtype).eps * expected.abs().max()
    assert error <= allowed, f"{name}: difference {error:.3g}, allowed {allowed:.3g}"


@contextmanager
def one_thread():
    """For what ours is compared with: small products wait for threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rms(tensor):
    return tensor.square().mean().sqrt()

"""How the kernels of bottleneck adapters are called, and the least that they have to move.

Sizes: n is the bottleneck's width, k the model's.
"""

from __future__ import annotations

from benchmarks.gpu_launches import Sizes, half, mask


def forward(sizes: Sizes, arch: int, same: bool = True, p: float = 0.0) -> None:
    """same: x is the residual, else another matrix."""
    from fusetune._triton.bottleneck import launch_bottleneck

    m, d, h = sizes
    down, up = half(arch, 1, d, h), half(arch, 1, h, d)
    biases = half(arch, 1, d), half(arch, 1, h)
    x, other = half(arch, m, h), None if same else half(arch, m, h)
    launch_bottleneck(
        x, down, biases[0], up, biases[1], [m], "gelu", other, same, *mask(p), arch=arch
    )


def backward(sizes: Sizes, arch: int, p: float = 0.0) -> None:
    """x is the residual."""
    from fusetune._triton.bottleneck_backward import launch_bottleneck_backward

    m, d, h = sizes
    down, up, z = half(arch, 1, d, h), half(arch, 1, h, d), half(arch, m, d)
    dy, x = half(arch, m, h), half(arch, m, h)
    launch_bottleneck_backward(
        dy, x, down, up, z, [m], "gelu", True, True, True, *mask(p), arch=arch
    )


def forward_bytes(sizes: Sizes) -> int:
    """x, which is the residual too, the parameters, y and z, each once."""
    m, d, h = sizes
    return 2 * (2 * m * h + 2 * d * h + d + h + m * d)


def other_residual_bytes(sizes: Sizes) -> int:
    m, _, h = sizes
    return forward_bytes(sizes) + 2 * m * h


def backward_bytes(sizes: Sizes) -> int:
    """dY, x, z and the weights, dX and the parameters' gradients, each once."""
    m, d, h = sizes
    return 2 * (3 * m * h + m * d + 4 * d * h) + 4 * (d + h)

"""Backward passes that write over what was saved do so only where nobody else can see it.

By cross_entropy and by glu, whose gradients are compared with those of inputs that are held.
"""

import pytest
import torch

from fusetune.ops import cross_entropy, glu

TARGET = torch.arange(6) % 9


def loss_of_logits(y):
    return cross_entropy(y, TARGET)


def loss_of_gate(y):
    return glu(y, torch.linspace(-1, 1, y.numel()).to(y.dtype).view_as(y)).square().sum()


OPS = {"cross_entropy": loss_of_logits, "glu": loss_of_gate}


@pytest.fixture(params=OPS)
def loss(request, backend):
    return OPS[request.param]


def made(dtype=torch.float32):
    """(leaf, what an op is given): the second is neither a leaf nor saved by who made it."""
    leaf = torch.randn(6, 9, dtype=dtype, requires_grad=True)
    return leaf, -leaf


def seen(y, addresses):
    y.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_takes_the_place_of_what_only_the_graph_holds(loss, dtype):
    leaf, y = made(dtype)
    kept = y.clone()
    [expected] = torch.autograd.grad(loss(kept), kept)
    address, addresses = y.data_ptr(), []
    seen(y, addresses)
    value = loss(y)
    del y
    value.backward()
    assert addresses == [address]
    assert torch.equal(leaf.grad, -expected)


HOLDERS = {
    "the output": lambda y: y,
    "a detached one": lambda y: y.detach(),
    "a view": lambda y: y[2:, 1],
    "an array": lambda y: y.detach().numpy(),
    "its storage": lambda y: y.untyped_storage(),
    "another node": lambda y: y.sin(),
    "the same op": lambda y: cross_entropy(y, TARGET),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_holds_is_left_alone(loss, holder):
    leaf, y = made()
    before = y.detach().clone()
    kept = y.clone()
    [expected] = torch.autograd.grad(loss(kept), kept)
    held, address, addresses = HOLDERS[holder](y), y.data_ptr(), []
    seen(y, addresses)
    value = loss(y)
    shape = y.shape
    del y
    [gradient] = torch.autograd.grad(value, leaf)
    assert addresses != [address]
    assert torch.equal(gradient, -expected)
    if isinstance(held, torch.UntypedStorage):
        assert torch.equal(torch.empty(0).set_(held).view(shape), before)
    if holder in ("the output", "a detached one"):
        assert torch.equal(held, before)
    if holder in ("another node", "the same op"):  # reads it in a backward pass of its own
        [got] = torch.autograd.grad(held.sum(), leaf)
        again = leaf.detach().clone().requires_grad_()
        [wanted] = torch.autograd.grad(HOLDERS[holder](-again).sum(), again)
        assert torch.equal(got, wanted)


def test_a_view_whose_base_is_kept(loss):
    """What models do: logits [B, T, V] are an output, the loss gets them as rows."""
    leaf = torch.randn(2, 3, 9, requires_grad=True)
    output = -leaf
    before = output.detach().clone()
    loss(output.view(-1, 9)).backward()
    assert torch.equal(output, before)


def test_a_graph_that_is_kept_gives_the_same_again(loss):
    leaf, y = made()
    value = loss(y)
    del y
    [first] = torch.autograd.grad(value, leaf, retain_graph=True)
    [second] = torch.autograd.grad(value, leaf)
    assert torch.equal(first, second)


def test_what_hooks_keep_is_left_alone(loss):
    packed = []

    def pack(tensor):
        packed.append((tensor, tensor.clone()))
        return tensor

    _, y = made()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(y)
    del y
    value.backward()
    assert packed
    for tensor, before in packed:
        assert torch.equal(tensor, before)


def test_a_change_in_between_is_noticed(loss):
    _, y = made()
    value = loss(y)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_both_arguments_of_glu_the_same(backend):
    leaf, y = made(torch.float64 if backend == "reference" else torch.float32)
    kept = y.detach().clone().requires_grad_()
    [expected] = torch.autograd.grad((torch.nn.functional.silu(kept) * kept).sum(), kept)
    value = glu(y, y).sum()
    del y
    value.backward()
    torch.testing.assert_close(leaf.grad, -expected)

"""Moments in eight bits: how exact they are, and that runs with them stop and go on exactly."""

import copy
import sys

import pytest
import torch
from torch import nn
from torchao.optim.quant_utils import create_dynamic_map

from sara_core import SaraAdamW
from sara_core.files.state_file import read_state, snapshot, write_state
from sara_core.optimizer import adam_moments, eight_bits
from sara_core.optimizer.eight_bits import BLOCK

from ..helpers import Net, loss_of

LENGTHS = (1, 255, 256, 1000)


def numbers(count, seed, spread=1.0):
    """Magnitudes over several powers of ten, as gradients have them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(spread * torch.randn(count, generator=generator))
    return 1e-3 * scale * torch.randn(count, generator=generator)


def filled(count, seed, kind="8bit"):
    state = adam_moments.zeros(torch.empty(count), kind)
    with adam_moments.opened([state]) as ((first,), (second,)):
        first.copy_(numbers(count, seed))
        second.copy_(numbers(count, seed + 1).square())
    return state


def read(state):
    with adam_moments.opened([copy.deepcopy(state)]) as ((first,), (second,)):
        return first.clone(), second.clone()


def nearest(values, signed):
    """The nearest numbers of torchao's map, found by trying all; the block's largest is among them."""
    numbers_of_map = torch.tensor(create_dynamic_map(signed=signed))
    found = []
    for block in values.split(BLOCK):
        ends = [block.max() / numbers_of_map[-1]]
        ends += [block.min() / numbers_of_map[0]] if signed else []
        numbers = numbers_of_map * max(ends)
        found.append(numbers[(block[:, None] - numbers).abs().argmin(1)])
    return torch.cat(found)


def test_it_keeps_the_nearest_number_and_of_the_second_moment_that_of_the_root():
    count = 100 * BLOCK
    first, second = read(filled(count, 0))
    for found, exact, signed in (
        (first, numbers(count, 0), True),
        (second.sqrt(), numbers(count, 1).abs(), False),
    ):
        reference = nearest(exact, signed)
        off = (found - exact).abs() - (reference - exact).abs()
        assert (off <= 1e-6 * exact.abs()).all()
        largest = exact.view(-1, BLOCK).abs().argmax(1, keepdim=True)
        kept = found.view(-1, BLOCK).gather(1, largest)
        torch.testing.assert_close(kept, exact.view(-1, BLOCK).gather(1, largest))


def test_several_weights_at_once_come_out_as_each_alone():
    together = [adam_moments.zeros(torch.empty(count), "8bit") for count in LENGTHS]
    with adam_moments.opened(together) as (firsts, seconds):
        assert [len(moment) for moment in firsts] == list(LENGTHS)
        assert all((moment == 0).all() for moment in (*firsts, *seconds))
        for seed, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            first.copy_(numbers(len(first), seed))
            second.copy_(numbers(len(first), seed + 1).square())
    for seed, (state, count) in enumerate(zip(together, LENGTHS, strict=True)):
        alone = filled(count, seed)
        assert state.keys() == alone.keys()
        assert all(torch.equal(state[key], alone[key]) for key in state)


@pytest.mark.parametrize("step", [None, 0, 1, 77])
def test_what_is_opened_and_left_alone_stays_as_it_is(step):
    state = filled(1000, 0)
    before = copy.deepcopy(state)
    with adam_moments.opened([state], step):
        pass
    assert all(torch.equal(before[key], state[key]) for key in state)


def test_over_many_steps_rounding_takes_nothing_away_and_adds_nothing():
    exact = numbers(BLOCK, 3), numbers(BLOCK, 4).abs()
    found = [[], []]
    for step in range(1000):
        state = adam_moments.zeros(exact[0], "8bit")
        with adam_moments.opened([state], step) as ((first,), (second,)):
            first.copy_(exact[0])
            second.copy_(exact[1].square())
        for values, value in zip(found, read(state), strict=True):
            values.append(value)
    means = torch.stack(found[0]).mean(0), torch.stack(found[1]).sqrt().mean(0)
    for mean, wanted, signed in zip(means, exact, (True, False), strict=True):
        nearest_off = (nearest(wanted, signed) - wanted).abs()
        assert (mean - wanted).abs().sum() < nearest_off.sum() / 30
        assert ((mean - wanted).abs() < 2e-3 * wanted.abs() + 1e-8).all()


def test_moments_follow_gradients_that_grow_and_fade():
    """The nearest code would hold the root of the second moment for ever."""
    torch.manual_seed(0)
    size = 1e-3 * torch.exp(torch.randn(20 * BLOCK))
    state, step = adam_moments.zeros(size, "8bit"), 0
    first, second = torch.zeros_like(size), torch.zeros_like(size)
    louder = torch.where(torch.arange(len(size)) % 2 == 0, 3.0, 1.0)
    for scale, num_steps in ((1.0, 300), (louder, 1000), (1.0, 2000)):
        for _ in range(num_steps):
            gradient = scale * size * torch.randn(len(size))
            with adam_moments.opened([state], step) as moments:
                for one, other in (moments[0] + moments[1], (first, second)):
                    one.lerp_(gradient, 0.1)
                    other.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            step += 1
        ratio = (read(state)[1] / second).sqrt()
        for part in (ratio[0::2], ratio[1::2]):
            assert abs(part.median().item() - 1) < 0.05
            assert 0.7 < part.quantile(0.05) < part.quantile(0.95) < 1.4


def test_offloaded_weights_are_updated_where_they_are():
    here, there = filled(300, 0), adam_moments.zeros(torch.empty(300, device="meta"), "8bit")
    expected = read(here)
    with adam_moments.opened([there, here, there]) as moments:
        for (first, second, third), wanted in zip(moments, expected, strict=True):
            assert [m.device.type for m in (first, second, third)] == ["meta", "cpu", "meta"]
            assert torch.equal(second, wanted)
            second *= 2
    for found, wanted in zip(read(here), expected, strict=True):
        torch.testing.assert_close(found, 2 * wanted)


def test_an_error_leaves_moments_as_they_were():
    state = filled(300, 0)
    before = copy.deepcopy(state)

    def run_out():
        with adam_moments.opened([state]) as moments:
            moments[0][0].zero_()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="memory"):
        run_out()
    assert all(torch.equal(before[key], state[key]) for key in state)


def test_a_block_whose_values_die_away_goes_to_zero_with_them():
    state = filled(200, 0)  # less than a block: what fills it up must not hold its scale
    for _ in range(200):
        with adam_moments.opened([state]) as moments:
            for (moment,) in moments:
                moment *= 0.5
    assert all((moment.abs() < 1e-30).all() for moment in read(state))


def test_updates_stay_near_adamws_where_gradients_differ_a_thousandfold():
    torch.manual_seed(0)
    net = nn.Linear(64, 256, bias=False)
    twin, start = copy.deepcopy(net), net.weight.detach().clone()
    optimizer = SaraAdamW(net, fraction=1.0, lr=1e-5, low_rank_weight=0, moments="8bit")
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-5, weight_decay=0)
    size = 1e-3 * torch.exp(1.5 * torch.randn(256, 64))
    drift = 0.3 * size * torch.randn(256, 64)
    for _ in range(300):
        gradient = drift + size * torch.randn(256, 64)
        for module, one in ((net, optimizer), (twin, reference)):
            (module.weight * gradient).sum().backward()
            one.step()
            one.zero_grad()
    change, expected = net.weight.detach() - start, twin.weight.detach() - start
    assert ((change - expected).norm() / expected.norm()).item() < 0.1
    assert change.abs().max() < 1.5 * expected.abs().max()


def test_a_step_takes_two_bytes_a_weight_instead_of_eight():
    net = nn.Linear(512, 512, bias=False)
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-3, moments="8bit")
    net(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    size = sum(tensor.nbytes for key, tensor in state.items() if key != "step")
    assert size == 2 * (512 * 256 + 4 * 512)  # codes, and the scale of each of 512 blocks


def assert_near(found, wanted):
    """First and second moments are the same up to half the widest step of the map."""
    for one, other, root in zip(found, wanted, (1, 0.5), strict=True):
        one, other = one.abs() ** root * one.sign(), other.abs() ** root * other.sign()
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=0.2, atol=1e-5 * other.abs().max().item())


def trained(net, optimizer, seeds):
    for seed in seeds:
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def make(moments):
    net = Net()
    return net, SaraAdamW(net, 0.05, lr=1e-2, progressive_step=4, moments=moments)


def saved(optimizer, folder):
    write_state(folder / "state.safetensors", snapshot(optimizer.state_dict()))
    return read_state(folder / "state.safetensors")


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path, stop):
    straight, optimizer = make("8bit")
    trained(straight, optimizer, range(8))
    first, optimizer = make("8bit")
    trained(first, optimizer, range(stop))
    state = saved(optimizer, tmp_path)
    second, optimizer = make("8bit")
    optimizer.load_state_dict(state)
    trained(second, optimizer, range(stop, 8))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_reselection_keeps_the_moments_of_weights_that_go_on():
    net, optimizer = make("8bit")
    trained(net, optimizer, range(3))
    (weight, *_) = optimizer._weights.active
    mark = weight.trained.abs() < optimizer.threshold
    before = [moment[mark] for moment in read(optimizer.state[weight.leaf])]
    optimizer.reselect()
    kept = optimizer._weights.active[0]
    assert 0 < len(kept) == mark.sum() < len(mark)
    assert_near(read(optimizer.state[kept.leaf]), before)  # packed once more, in other blocks
    assert optimizer.state[kept.leaf]["step"] == 3


@pytest.mark.parametrize(("before", "after"), [("fp32", "8bit"), ("8bit", "fp32")])
def test_a_state_of_the_other_kind_is_taken_over(tmp_path, before, after):
    net, optimizer = make(before)
    trained(net, optimizer, range(2))
    state = saved(optimizer, tmp_path)
    assert state["sara"]["format"] == (2 if before == "8bit" else 1)
    other, resumed = make(after)
    resumed.load_state_dict(state)
    wanted = [read(state) for state in optimizer.state.values()]
    for one, two in zip(resumed.state.values(), wanted, strict=True):
        assert (one["exp_avg"].dtype == torch.uint8) == (after == "8bit")
        assert_near(read(one), two)
    trained(other, resumed, range(2, 4))
    assert resumed.num_steps == 4


def test_moments_of_another_precision_stay_in_it():
    net = nn.Linear(9, 9).double()
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-3, moments="8bit")
    net(torch.ones(1, 9, dtype=torch.float64)).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("key", ["exp_avg_sq_scale", "exp_avg", "step"])
def test_damaged_moments_are_refused(key):
    net, optimizer = make("8bit")
    trained(net, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    if key == "step":
        del state["state"][0]["step"]
    else:
        state["state"][0][key] = torch.zeros(3)
    with pytest.raises(ValueError, match="moments do not fit"):
        optimizer.load_state_dict(state)
    trained(net, optimizer, range(1, 3))


def test_without_torchao_it_says_what_to_install(monkeypatch):
    net, optimizer = make("8bit")
    trained(net, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    eight_bits._map.cache_clear()
    net = nn.Linear(4, 4)
    with pytest.raises(ImportError, match="pip install -U torchao"):
        SaraAdamW(net, fraction=0.5, lr=1e-3, moments="8bit")
    assert all(parameter.requires_grad for parameter in net.parameters())
    other, optimizer = make("fp32")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ImportError, match="pip install -U torchao"):
        optimizer.load_state_dict(state)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    trained(other, optimizer, range(1))
    assert optimizer.num_steps == 1


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="moments='4bit'; expected one of fp32, 8bit"):
        SaraAdamW(nn.Linear(4, 4), fraction=0.5, moments="4bit")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_keeps_the_same_moments_and_waits_for_nothing():
    states = [filled(1000, 0), filled(300, 5)]
    there = [{key: value.cuda() for key, value in state.items()} for state in states]
    for step in range(3):
        if step:
            torch.cuda.set_sync_debug_mode("error")
        for group in (states, there):
            with adam_moments.opened(group, step) as moments:
                for moment in (*moments[0], *moments[1]):
                    moment.mul_(0.9)
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(states, there, strict=True):
        for found, wanted in zip(read(other), read(one), strict=True):
            torch.testing.assert_close(found.cpu(), wanted, rtol=0.2, atol=1e-9)

import copy
import gc

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.optimizer.sparse_weight import SparseWeight

from .helpers import DenseReference, Net, loss_of, sample

THRESHOLD, LR = 0.05, 1e-2


def pair(dtype=torch.float32, **options):
    net = Net().to(dtype)
    twin = copy.deepcopy(net)
    options = {"lr": LR, "low_rank_weight": 0, **options}
    return net, SaraAdamW(net, THRESHOLD, **options), DenseReference(twin, THRESHOLD, options["lr"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_updates_equal_torchs_adamw_on_masked_dense_gradients(dtype):
    net, optimizer, reference = pair(dtype)
    for seed in range(12):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.backward(loss_of(reference.net, seed))
        reference.step()
    reference.assert_equals(net)  # bit for bit: the arithmetic is the same
    assert optimizer.num_trainable == sum(int(m.sum()) for m in reference.masks)
    assert all(values.dtype == torch.float32 for values in optimizer.parameters())


def test_accumulated_gradients_add_up():
    net, optimizer, reference = pair()
    for step in range(4):
        for micro in range(3):
            loss_of(net, 10 * step + micro).backward()
            reference.backward(loss_of(reference.net, 10 * step + micro))
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    reference.assert_equals(net)


def test_no_dense_gradient_outlives_its_layers_backward():
    net, optimizer, _ = pair()
    alive = []
    for parameter in filter(lambda p: p.requires_grad, net.parameters()):
        parameter.register_hook(
            lambda g: alive.append([p.grad is not None for p in net.parameters()])
        )
    loss_of(net, 0).backward()
    assert len(alive) == 4
    assert not any(any(row) for row in alive)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [v.grad.shape for v in optimizer.parameters() if v.grad is not None]


def test_state_is_proportional_to_the_trained_weights():
    net, optimizer, _ = pair()
    loss_of(net, 0).backward()
    optimizer.step()
    trained = sum(len(v) for v in optimizer.parameters() if v.grad is not None)
    moments = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    assert sum(t.numel() for t in moments) == 2 * trained
    held = [t for r in optimizer.state_dict()["sara"]["weights"] for t in r.values()]
    held = [t for t in held if isinstance(t, torch.Tensor)]
    assert sum(t.numel() for t in held) == 3 * optimizer.num_trainable
    assert {t.dtype for t in held} == {torch.int32, torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unselected_weights_stay_bit_identical_with_decay_on(dtype):
    net, optimizer, _ = pair(dtype, weight_decay=0.1, low_rank_weight=1e-2)
    before = copy.deepcopy(net)
    for seed in range(8):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = 0
    for (name, old), new in zip(before.named_parameters(), net.parameters(), strict=True):
        free = (old.float().abs() < THRESHOLD) if old.dim() > 1 else torch.zeros_like(old).bool()
        assert torch.equal(old[~free], new[~free]), name
        changed += int((old != new).sum())
    assert changed > 500


def test_decay_pulls_the_delta_to_zero_and_not_the_weight():
    net, optimizer, reference = pair(weight_decay=0.5)
    reference.decay = 0.5
    for seed in range(6):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.backward(loss_of(reference.net, seed))
        reference.step()
    reference.assert_equals(net)


def test_torchs_deterministic_mode_gives_the_same_bits():
    nets = []
    for is_deterministic in (False, True):
        net, optimizer, _ = pair(weight_decay=0.5, low_rank_weight=1e-2)
        before = copy.deepcopy(net.state_dict())
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            for seed in range(3):
                loss_of(net, seed).backward()
                optimizer.step()
                optimizer.zero_grad()
            nets.append(copy.deepcopy(net.state_dict()))
            optimizer.restore()
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(v, nets[1][k]) for k, v in nets[0].items())
    assert not all(torch.equal(v, before[k]) for k, v in nets[0].items())


def test_progressive_adjustment_freezes_what_left_and_keeps_the_moments():
    net, optimizer, reference = pair(progressive_step=5, lr=2e-2)
    reference.lr = 2e-2
    first = optimizer.num_trainable
    for step in range(10):
        if step == 5:
            reference.reselect()
            learned = [m.detach().clone() for m in reference.masters]
        loss_of(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.backward(loss_of(reference.net, step))
        reference.step()
    reference.assert_equals(net)
    assert optimizer.stage == 2
    assert 0 < optimizer.num_trainable < first
    assert optimizer.num_trainable == sum(int(m.sum()) for m in reference.masks)
    for master, old, mask in zip(reference.masters, learned, reference.masks, strict=True):
        assert torch.equal(master[~mask], old[~mask])
    assert optimizer.delta().num_values == first  # frozen ones stay in the delta


def test_gradient_gathered_before_the_switch_is_used():
    net, optimizer, reference = pair(lr=2e-2)
    for step in range(6):
        loss_of(net, step).backward()
        reference.backward(loss_of(reference.net, step))
        if step == 3:
            optimizer.reselect()
            reference.reselect()
            assert any(v.grad is not None for v in optimizer.parameters())
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    reference.assert_equals(net)


def test_progressive_step_zero_keeps_one_stage():
    net, optimizer, _ = pair(progressive_step=0)
    for step in range(3):
        loss_of(net, step).backward()
        optimizer.step()
    assert optimizer.stage == 1


def test_switch_that_would_leave_nothing_is_skipped_with_a_warning(caplog):
    net = nn.Linear(4, 4, bias=False)
    optimizer = SaraAdamW(net, 10.0, lr=100.0, low_rank_weight=0, progressive_step=1)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert (optimizer.stage, optimizer.num_trainable) == (1, 16)
    assert "all 16 trained weights have left the threshold" in caplog.text


def test_low_rank_term_changes_what_is_learned_as_its_gradient_says():
    torch.manual_seed(0)
    net = nn.Linear(72, 90, bias=False)
    base = net.weight.detach().clone()
    mask = base.abs() < THRESHOLD
    optimizer = SaraAdamW(net, THRESHOLD, lr=1e-3, low_rank_weight=3e-2)
    dense = torch.optim.AdamW([weight := nn.Parameter(base.clone())], lr=1e-3, weight_decay=0)
    for seed in range(5):
        x = torch.randn(3, 72, generator=torch.Generator().manual_seed(seed))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        norm = torch.linalg.matrix_norm(weight * mask, ord="nuc")
        dense.zero_grad()
        ((x @ weight.T).square().mean() + 3e-2 * norm).backward()
        weight.grad *= mask
        dense.step()
        assert optimizer.low_rank_loss.item() == pytest.approx(3e-2 * norm.item(), rel=1e-3)
    moved = (weight - base)[mask].norm()
    assert (net.weight - weight)[mask].norm() < 0.02 * moved  # SVD against matrix products


def test_low_rank_shrinks_the_nuclear_norm_and_its_draw_has_its_own_generator():
    norms = {}
    for weight in (0.0, 0.05):
        net, optimizer, _ = pair(low_rank_weight=weight, low_rank_matrices=2, seed=3)
        state = torch.get_rng_state()
        for seed in range(20):
            loss_of(net, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(torch.get_rng_state(), state)
        base = Net()
        norms[weight] = sum(
            torch.linalg.matrix_norm(p * (b.abs() < THRESHOLD), ord="nuc").item()
            for p, b in ((net.first.weight, base.first.weight), (net.last.weight, base.last.weight))
        )
    assert norms[0.05] < 0.9 * norms[0.0]


def test_same_seed_same_result_other_seed_other_draws():
    results = []
    for seed in (1, 1, 2):
        net, optimizer, _ = pair(low_rank_weight=0.05, seed=seed)
        for step in range(5):
            loss_of(net, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(net.last.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_parameters_without_gradient_are_left_alone():
    net, optimizer, _ = pair(weight_decay=0.1)
    before = net.unused.weight.detach().clone()
    loss_of(net, 0).backward()
    optimizer.step()
    assert torch.equal(net.unused.weight, before)
    assert len(optimizer.state) == len(optimizer.parameters()) - 1


def test_clipping_what_the_optimizer_exposes_bounds_the_update():
    net, optimizer, reference = pair()
    loss_of(net, 0).backward()
    reference.backward(loss_of(reference.net, 0))
    norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters(), 1e-3)
    expected = torch.cat([m.grad.flatten() for m in reference.masters if m.grad is not None]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    clipped = torch.cat([v.grad for v in optimizer.parameters() if v.grad is not None]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_low_rank_gradient_is_added_once_and_can_be_clipped():
    net, optimizer, _ = pair(low_rank_weight=1.0)
    loss_of(net, 0).backward()
    before = [v.grad.clone() for v in optimizer.parameters() if v.grad is not None]
    optimizer.add_low_rank_gradient_()
    once = [v.grad.clone() for v in optimizer.parameters() if v.grad is not None]
    assert sum(not torch.equal(a, b) for a, b in zip(before, once, strict=True)) == 1
    optimizer.step()
    after = [v.grad for v in optimizer.parameters() if v.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(once, after, strict=True))


def test_scaler_that_skips_a_step_leaves_everything_usable():
    net, optimizer, reference = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        loss = loss_of(net, step)
        if step == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 1:
            reference.backward(loss_of(reference.net, step))
            reference.step()
    reference.assert_equals(net)
    assert optimizer.num_steps == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_update(reentrant):
    net, optimizer, reference = pair()
    picture, word = sample(0)
    picture.requires_grad_()
    out = torch.utils.checkpoint.checkpoint(net, picture, word, use_reentrant=reentrant)
    out.square().mean().backward()
    optimizer.step()
    reference.backward(loss_of(reference.net, 0))
    reference.step()
    reference.assert_equals(net)


def test_tied_transposed_and_sparse_gradient_weights_train():
    torch.manual_seed(0)
    table = nn.Embedding(50, 30, sparse=True)
    head = nn.Linear(30, 50, bias=False)
    head.weight = nn.Parameter(torch.randn(30, 50).T)
    assert not head.weight.is_contiguous()
    tied = nn.Linear(30, 30, bias=False)
    net = nn.ModuleDict(
        {"table": table, "a": tied, "b": nn.Linear(30, 30, bias=False), "head": head}
    )
    net["b"].weight = tied.weight

    def loss(n):
        return n["head"](n["b"](torch.tanh(n["a"](n["table"](torch.arange(5)))))).square().mean()

    twin = copy.deepcopy(net)
    twin["table"].sparse = False
    optimizer = SaraAdamW(net, 0.1, lr=LR, low_rank_weight=0)
    reference = DenseReference(twin, 0.1, LR)
    for _ in range(3):
        loss(net).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.backward(loss(twin))
        reference.step()
    reference.assert_equals(net)
    assert not net["head"].weight.is_contiguous()


def test_everything_selected_equals_full_fine_tuning():
    net = Net()
    twin = copy.deepcopy(net)
    optimizer = SaraAdamW(net, fraction=1.0, lr=LR, low_rank_weight=0, biases_and_norms=True)
    full = torch.optim.AdamW(twin.parameters(), lr=LR, weight_decay=0)
    for seed in range(5):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        full.zero_grad()
        loss_of(twin, seed).backward()
        full.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_restore_brings_the_same_bits_flags_and_objects_back(dtype):
    net = Net().to(dtype)
    net.norm.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    objects = dict(net.named_parameters())
    optimizer = SaraAdamW(net, THRESHOLD, lr=0.1, progressive_step=2)
    for seed in range(4):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(net.last.weight, before["last.weight"])
    optimizer.restore()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter is objects[name]
        assert parameter.requires_grad == flags[name]
        assert not parameter._post_accumulate_grad_hooks
    with pytest.raises(RuntimeError, match="detached from its model"):
        optimizer.step()


@pytest.mark.parametrize("from_trained_model", [False, True])
@pytest.mark.parametrize("stop", [3, 6])
def test_a_reloaded_run_continues_exactly(stop, from_trained_model, tmp_path):
    options = {"lr": LR, "low_rank_weight": 1e-2, "progressive_step": 4, "weight_decay": 0.1}

    def run(net, optimizer, steps):
        for seed in steps:
            loss_of(net, seed).backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, base = Net(), Net()
    one = SaraAdamW(straight, THRESHOLD, seed=1, **options)
    run(straight, one, range(9))

    stopped = copy.deepcopy(base)
    run(stopped, first := SaraAdamW(stopped, THRESHOLD, seed=1, **options), range(stop))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    if from_trained_model:
        base.load_state_dict(stopped.state_dict())
    second = SaraAdamW(base, fraction=0.02, lr=0.5, seed=99)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(base, second, range(stop, 9))

    for a, b in zip(straight.parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b)
    second.restore()
    for a, b in zip(Net().parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_that_does_not_fit_changes_nothing():
    net, optimizer, _ = pair()
    other = nn.Sequential(nn.Linear(80, 70))
    foreign = SaraAdamW(other, 0.05, lr=LR)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"another model: 0\.weight is missing"):
        optimizer.load_state_dict(foreign.state_dict())
    with pytest.raises(ValueError, match="not a SaraAdamW state"):
        optimizer.load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())
    after = optimizer.state_dict()
    for a, b in zip(before["sara"]["weights"], after["sara"]["weights"], strict=True):
        assert torch.equal(a["values"], b["values"])
        assert torch.equal(a["index"], b["index"])


def break_state(state, how):
    own = state["sara"]
    first = own["weights"][0]
    if how == "no generator":
        del own["generator"]
    elif how == "no groups":
        state["param_groups"] = []
    elif how == "no moments":
        del state["state"]
    elif how == "out of range":
        first["index"] = first["index"] + 10**6
    elif how == "unsorted":
        first["index"] = first["index"].flip(0)
    elif how == "short":
        first["values"] = first["values"][:-1]
    elif how == "moments":
        state["state"][0]["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no generator", "not a SaraAdamW state"),
        ("no groups", "moments do not fit"),
        ("no moments", "moments do not fit"),
        ("out of range", "do not belong together"),
        ("unsorted", "do not belong together"),
        ("short", "moments do not fit"),
        ("moments", "moments do not fit"),
    ],
)
def test_a_damaged_state_changes_nothing(how, message):
    net, optimizer, _ = pair()
    loss_of(net, 0).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(net.state_dict())
    break_state(state, how)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True)
    )
    loss_of(net, 1).backward()
    optimizer.step()


def test_a_state_from_another_base_is_refused():
    _, optimizer, _ = pair()
    other = SaraAdamW(Net(seed=1), THRESHOLD, lr=LR)
    with pytest.raises(ValueError, match="another base"):
        optimizer.load_state_dict(other.state_dict())


def test_two_optimizers_on_one_model_are_refused_until_the_first_lets_go():
    net, optimizer, _ = pair()
    with pytest.raises(RuntimeError, match="already being trained .* restore\\(\\) or detach"):
        SaraAdamW(net, THRESHOLD, lr=LR)
    loss_of(net, 0).backward()
    optimizer.step()
    optimizer.detach()
    assert SaraAdamW(net, THRESHOLD, lr=LR).num_trainable > 0


def test_a_forgotten_optimizer_no_longer_takes_gradients_away():
    net, optimizer, reference = pair()
    del optimizer, reference
    gc.collect()
    net.requires_grad_(True)
    loss_of(net, 0).backward()
    assert net.last.weight.grad.abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_agrees_with_the_dense_reference_there(dtype):
    net = Net().to("cuda", dtype)
    reference = DenseReference(copy.deepcopy(net), THRESHOLD, LR)
    optimizer = SaraAdamW(net, THRESHOLD, lr=LR, low_rank_weight=0, progressive_step=2)
    for seed in range(4):
        picture, word = sample(seed, dtype)
        for model in (net, reference.net):
            loss = model(picture.cuda(), word.cuda()).float().square().mean()
            loss.backward() if model is net else reference.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        if seed == 1:
            reference.reselect()
    for (name, a), b in zip(net.named_parameters(), reference.net.parameters(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-4), name
    delta = 0.5 * optimizer.delta() + 0.5 * optimizer.delta()
    optimizer.restore()
    delta.apply_to(net)


def test_moving_or_converting_the_model_afterwards_is_said():
    net, optimizer, _ = pair()
    loss_of(net, 0).backward()
    net.half()
    with pytest.raises(RuntimeError, match=r"is now torch\.float16 .* was torch\.float32"):
        optimizer.step()


def test_float8_weights_are_refused():
    net = nn.Linear(8, 8)
    net.weight = nn.Parameter(net.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="requires_grad=False"):
        SaraAdamW(net, 0.1)
    net.weight.requires_grad_(True)
    with pytest.raises(TypeError, match="'weight' \\(torch.float8_e4m3fn\\)"):
        SaraAdamW(net, 0.1)


def test_schedulers_closures_and_defaults_work_as_with_torch():
    net = Net()
    optimizer = SaraAdamW(net, 2e-3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 2.718281828459045**-0.7)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 1e-3 * 2.718281828459045**-0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"low_rank_weight": float("nan")}, "low_rank_weight is nan"),
        ({"progressive_step": -1}, "progressive_step is -1"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SaraAdamW(Net(), THRESHOLD, **{"lr": LR, **options})


@pytest.mark.parametrize("step", [1, 200, 255, 256, 30_000, 40_000])
def test_positions_survive_being_kept_as_gaps(step):
    parameter = torch.nn.Parameter(torch.randn(5 * step + 7, 1))
    for index in (torch.arange(0, 5 * step, step), torch.tensor([5 * step + 6]), torch.tensor([0])):
        weight = SparseWeight("w", parameter, index.int())
        assert torch.equal(weight.index, index)
        assert weight.index.dtype == torch.int32
        assert torch.equal(weight.base, parameter.detach().flatten()[index])


def test_a_tenth_of_the_weights_costs_one_byte_a_position():
    parameter = torch.nn.Parameter(torch.randn(300, 300))
    index = torch.nonzero(torch.rand(90_000, generator=torch.Generator().manual_seed(0)) < 0.1)[
        :, 0
    ]
    weight = SparseWeight("w", parameter, index)
    kept = [t for t in vars(weight).values() if isinstance(t, torch.Tensor) and t is not parameter]
    assert sum(t.numel() * t.element_size() for t in kept) == (1 + 4 + 4) * len(index)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 17), (torch.float16, 19)])
def test_bytes_per_trained_weight(dtype, expected):
    """Gradient 4, moments 8, base 2 or 4, gap 1; the trained value 4 where the model cannot hold it."""
    torch.manual_seed(0)
    net = nn.Linear(500, 400, bias=False).to(dtype)
    optimizer = SaraAdamW(net, fraction=0.1, lr=1e-3, low_rank_weight=0)
    for _ in range(2):
        net(torch.randn(3, 500, dtype=dtype)).square().sum().backward()
        optimizer.step()
    held, seen, todo = 0, set(), [optimizer._weights.active, dict(optimizer.state)]
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            if item is net.weight:
                continue
            if item.grad is not None:
                todo.append(item.grad)
            storage = item.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held += storage.nbytes()
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo.append(vars(item))
    assert optimizer.num_trainable == pytest.approx(20_000, rel=0.001)  # equal magnitudes in half
    assert held / optimizer.num_trainable == pytest.approx(expected, abs=0.01)


def test_what_was_learned_outlasts_restore_and_later_changes():
    for ending in ("restore", "detach"):
        torch.manual_seed(0)
        net = nn.Linear(20, 20)
        optimizer = SaraAdamW(net, fraction=0.3, lr=1e-2)
        for _ in range(3):
            net(torch.randn(5, 20)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        before = optimizer.delta().entries["weight"].values.clone()
        state = optimizer.state_dict()["sara"]["weights"][0]["values"].clone()
        getattr(optimizer, ending)()
        with torch.no_grad():
            net.weight.fill_(3.0)
        assert torch.equal(optimizer.delta().entries["weight"].values, before)
        assert torch.equal(optimizer.state_dict()["sara"]["weights"][0]["values"], state)
        assert before.abs().min() > 0

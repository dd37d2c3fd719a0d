"""What an engine promises beyond parity: errors on all ranks, empty shards, partial training, evaluation, loaders."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engine_tiny import make_optimizer, ragged_rows, run_ranks, tiny_llama, train_plainly, unsharded_loss

from longctx.errors import EngineError, NonFiniteError

from tolerances import tolerance

STAGES = [0, 1, 2, 3]


def make_engine(
    ring: int, stage: int, *, model: Any = None, optimizer: str = "sgd", gas: int = 1, **config: Any
) -> Any:
    import longctx

    offload = config.pop("offload", False)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 600}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **config,
    }
    model = tiny_llama() if model is None else model
    trained = [p for p in model.parameters() if p.requires_grad]
    return longctx.initialize(model, settings, longctx.Mesh(ring=ring), optimizer=make_optimizer("sgd", trained))[0]


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


def run_window(engine: Any, window: list[dict[str, torch.Tensor]]) -> None:
    for batch in engine.shard(window):
        engine.backward(engine(**batch).loss)
        engine.step()


# -- a loss or gradient that is not finite ----------------------------------------------------------------------------


def broken(rank: int, world: int, stage: int, fault: str, options: dict[str, Any]) -> dict[str, Any]:
    engine = make_engine(2, stage, gas=2, **options)
    run_window(engine, [ragged_rows(0, index, engine.mesh.data_rank) for index in range(2)])
    before, steps = weights_of(engine), engine.global_steps
    window = engine.shard([ragged_rows(1, index, engine.mesh.data_rank) for index in range(2)])
    message = ""
    for index, batch in enumerate(window):
        loss = engine(**batch).loss
        if rank == 2 and index == 0:  # one rank, one micro-batch
            loss = loss * math.nan if fault == "nan" else loss + math.inf  # + inf: the gradients stay finite
        engine.backward(loss)
        if index == 0:
            engine.step()
    try:
        engine.step()
    except NonFiniteError as error:
        message = str(error)
    after = weights_of(engine)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    counted = engine.global_steps - steps
    run_window(engine, [ragged_rows(2, index, engine.mesh.data_rank) for index in range(2)])  # and it can go on
    loss, moved = engine.global_loss, not torch.equal(weights_of(engine)["lm_head.weight"], after["lm_head.weight"])
    engine.destroy()
    return {"message": message, "unchanged": unchanged, "counted": counted, "loss": loss, "moved": moved}


PATHS = [
    (0, {}),
    (1, {}),
    (2, {}),
    (3, {}),
    (0, {"bf16": {"enabled": True}}),
    (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    (2, {"bf16": {"enabled": True, "check_grad_overflow": False}}),
    (3, {"bf16": {"enabled": True}}),
    (1, {"offload": True}),
    (3, {"offload": True}),
]


@pytest.mark.parametrize("fault", ["nan", "inf"])
@pytest.mark.parametrize(("stage", "options"), PATHS)
def test_nothing_is_updated_when_a_loss_of_any_rank_is_not_finite(
    stage: int, options: dict[str, Any], fault: str
) -> None:
    for result in run_ranks(4, broken, stage, fault, options):
        assert "not finite" in result["message"]
        assert result["unchanged"] and result["counted"] == 0
        assert math.isfinite(result["loss"]) and result["moved"]


# -- shards without a label, frozen weights, checkpointing, bf16 ------------------------------------------------------


def lonely_rows(step: int, micro_batch: int, replica: int) -> dict[str, torch.Tensor]:
    """Rows whose few labels lie on one rank of the ring; replica 1 has none at all."""
    rows = ragged_rows(step, micro_batch, replica)
    length = rows["labels"].shape[1]
    keep = torch.zeros(length, dtype=torch.bool)
    if replica == 0:
        keep[1:4] = True  # the first zigzag chunk: rank 0's
    return {**rows, "labels": rows["input_ids"].masked_fill(~keep, -100), "position_ids": torch.arange(length)}


FROZEN = {
    "queries": "q_proj",
    "keys": "k_proj",
    "values": "v_proj",
    "first layer": "layers.0",
    "all but an adapter": "",
}


def freeze(model: torch.nn.Module, frozen: str | None) -> torch.nn.Module:
    if frozen == "all but an adapter":
        return add_adapters(model)
    for name, parameter in model.named_parameters():
        if frozen is not None and FROZEN[frozen] in name:
            parameter.requires_grad_(False)
    return model


class Adapter(torch.nn.Module):
    """A LoRA-style pair of thin matrices beside a frozen linear layer."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = torch.nn.Linear(linear.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def add_adapters(model: torch.nn.Module) -> torch.nn.Module:
    model.requires_grad_(False)
    torch.manual_seed(11)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
    return model


def partly(rank: int, world: int, ring: int, stage: int, frozen: str | None, rows: str, checkpointing: bool) -> Any:
    model = freeze(tiny_llama(), frozen)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    engine = make_engine(ring, stage, model=model, gas=2)
    losses, norms = [], []
    make_rows = lonely_rows if rows == "lonely" else ragged_rows
    for step in range(3):
        run_window(engine, [make_rows(step, index, engine.mesh.data_rank) for index in range(2)])
        losses.append(engine.global_loss)
        norms.append(engine.grad_norm)
    weights = weights_of(engine)
    engine.destroy()
    return losses, norms, weights


def check_partly(stage: int, frozen: str | None = None, rows: str = "ragged", checkpointing: bool = False) -> None:
    model = freeze(tiny_llama(), frozen)
    optimizer = make_optimizer("sgd", [p for p in model.parameters() if p.requires_grad])
    make_rows = lonely_rows if rows == "lonely" else ragged_rows
    truth = train_plainly(model, optimizer, steps=3, replicas=2, accumulation=2, clip=0, rows=make_rows)
    for losses, norms, weights in run_ranks(4, partly, 2, stage, frozen, rows, checkpointing):
        torch.testing.assert_close(losses, truth["losses"], rtol=tolerance("training loss"), atol=0)
        torch.testing.assert_close(norms, truth["norms"], rtol=tolerance("training norm"), atol=0)
        for name, weight in truth["weights"].items():
            assert (weights[name] - weight).norm() <= tolerance("training weight") * weight.norm(), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_or_replica_without_a_label_contributes_nothing(stage: int) -> None:
    check_partly(stage, rows="lonely")


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("frozen", list(FROZEN))
def test_partial_training_neither_hangs_nor_errs(stage: int, frozen: str) -> None:
    check_partly(stage, frozen)


@pytest.mark.parametrize("stage", [1, 3])
def test_activation_checkpointing_changes_nothing(stage: int) -> None:
    check_partly(stage, checkpointing=True)


def smoke(rank: int, world: int, stage: int, config: dict[str, Any]) -> list[float]:
    engine = make_engine(2, stage, gas=2, gradient_clipping=1.0, **config)
    losses = []
    for _ in range(6):
        run_window(engine, [ragged_rows(0, index, engine.mesh.data_rank) for index in range(2)])
        losses.append(engine.global_loss)
        assert 0 < engine.grad_norm < 10
    engine.destroy()
    return losses


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        (0, {}),
        (1, {}),
        (1, {"data_types": {"grad_accum_dtype": "fp32"}}),
        (2, {"offload": True}),
        (3, {}),
        (3, {"data_types": {"grad_accum_dtype": "fp32"}}),
    ],
)
def test_bf16_learns_and_agrees_with_fp32(stage: int, config: dict[str, Any]) -> None:
    model = tiny_llama()
    optimizer = make_optimizer("sgd", model.parameters())
    rows = lambda step, index, replica: ragged_rows(0, index, replica)  # noqa: E731
    truth = train_plainly(model, optimizer, steps=6, replicas=2, accumulation=2, clip=1.0, rows=rows)
    results = run_ranks(4, smoke, stage, {"bf16": {"enabled": True}, **config})
    assert all(result == results[0] for result in results)
    torch.testing.assert_close(results[0], truth["losses"], rtol=tolerance("bf16 training loss"), atol=0)
    assert results[0][-1] < results[0][0]


# -- misuse -----------------------------------------------------------------------------------------------------------


def misused(rank: int, world: int) -> list[str]:
    import longctx

    engine = make_engine(2, 1, gas=2)
    rows = ragged_rows(0, 0, engine.mesh.data_rank)
    messages = []

    def refused(action: Any) -> None:
        with pytest.raises(EngineError) as error:
            action()
        messages.append(str(error.value))

    refused(lambda: engine.global_loss)
    refused(lambda: engine.shard(rows))
    refused(lambda: engine.backward(torch.zeros((), requires_grad=True), scale_wrt_gas=True))
    model = tiny_llama()
    refused(lambda: longctx.initialize(model, {}, engine.mesh, mpu=engine.mesh))
    refused(lambda: longctx.initialize(None, {}, engine.mesh))
    assert math.isnan(engine.grad_norm)
    engine.destroy()
    return messages


def test_misuse_is_named() -> None:
    for first, window, scale, mpu, model in run_ranks(4, misused):
        assert "no window" in first and "gradient_accumulation_steps is 2" in window
        assert "scale_wrt_gas" in scale and "mpu" in mpu and "needs a model" in model


def local_mean(rank: int, world: int) -> str:
    """BERT's head takes num_items_in_batch and returns its local mean all the same."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    engine = make_engine(2, 1, model=BertForMaskedLM(config))
    rows = ragged_rows(0, 0, engine.mesh.data_rank)
    rows["shift_labels"] = rows.pop("labels")  # a masked model predicts the token itself
    batch = engine.shard(rows)
    with pytest.raises(EngineError) as error:
        engine(**batch)
    engine.destroy()
    return str(error.value)


def test_a_model_that_returns_its_local_mean_is_refused_by_name() -> None:
    messages = run_ranks(4, local_mean)
    assert any("BertForMaskedLM" in message and "token_loss" in message for message in messages)


# -- evaluation, loader, log-probabilities ----------------------------------------------------------------------------


def evaluated(rank: int, world: int, stage: int, counts: list[int]) -> Any:
    import longctx.engine.window as window

    engine = make_engine(2, stage)
    replica = engine.mesh.data_rank
    batches = [ragged_rows(5, index, replica) for index in range(counts[replica])]
    whole = engine.evaluate(batches)
    parts = engine.evaluate((window.cut_rows(b, engine.mesh, engine.layout) for b in batches), sharded=True)
    assert engine.module.training and parts == whole
    assert math.isnan(engine.evaluate([]).loss)
    missing = {key: value for key, value in ragged_rows(0, 0, 0).items() if key != "labels"}
    with pytest.raises(EngineError) as error:
        engine.evaluate([missing] if rank == 0 else [ragged_rows(0, 0, 0)])
    run_window(engine, [ragged_rows(0, 0, replica)])  # and training goes on
    engine.destroy()
    return whole, str(error.value)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("counts", [[3, 1], [0, 2]])
def test_evaluation_with_unequal_numbers_of_batches(stage: int, counts: list[int]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        sums = [unsharded_loss(model, ragged_rows(5, index, r)) for r in range(2) for index in range(counts[r])]
    loss, tokens = sum(float(total) for total, _ in sums), sum(count for _, count in sums)
    for rank, (found, message) in enumerate(run_ranks(4, evaluated, stage, counts)):
        assert found.tokens == tokens
        assert found.loss == pytest.approx(loss / tokens, rel=tolerance("training loss"))
        assert ("needs labels" in message) if rank == 0 else ("ranks [0]" in message)


class Rows:
    """A map-style dataset whose rows say their own number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"input_ids": [index] * 8, "labels": [index] * 8}


def loaded(rank: int, world: int, ring: int) -> Any:
    import longctx

    model = tiny_llama()
    config = {
        "train_batch_size": 4, "gradient_accumulation_steps": 2, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000},
    }  # fmt: skip
    optimizer = make_optimizer("sgd", model.parameters())
    mesh = longctx.Mesh(ring=ring)
    engine, _, loader, _ = longctx.initialize(model, config, mesh, optimizer=optimizer, training_data=Rows(18), seed=7)
    assert loader is not None and len(loader) == 4

    def numbers(window: list[Any]) -> list[list[int]]:
        return [batch["input_ids"][:, 0].tolist() for batch in window]

    first = [numbers(window) for window in loader]
    losses = []
    for window in loader:  # the next epoch: another order
        for batch in window:
            engine.backward(engine(**batch).loss)
            engine.step()
        losses.append(engine.global_loss)
        if len(losses) == 2:
            break
    state = loader.state_dict()
    rest = [numbers(window) for window in loader]
    loader.load_state_dict(state)
    again = [numbers(window) for window in loader]
    with pytest.raises(EngineError, match="18 rows|3 rows"):
        type(loader)(Rows(3), engine)
    with pytest.raises(EngineError, match="map-style"):
        type(loader)(iter([]), engine)
    engine.destroy()
    return mesh.data_rank, first, rest == again, state, losses


def test_training_data_is_dealt_out_alike_on_any_mesh() -> None:
    orders, losses = [], []
    for world, ring in ((2, 2), (4, 2), (2, 1)):
        results = run_ranks(world, loaded, ring)
        replicas = {data_rank: first for data_rank, first, *_ in results}
        steps = [
            sorted(row for first in replicas.values() for part in first[step] for row in part) for step in range(4)
        ]
        assert len({row for step in steps for row in step}) == 16  # no row twice in an epoch
        orders.append(steps)
        losses.append(results[0][4])
        assert all(resumed and state == {"seed": 7, "consumed": 24} for _, _, resumed, state, _ in results)
    assert orders[0] == orders[1] == orders[2]
    torch.testing.assert_close(losses[1:], [losses[0]] * 2, rtol=tolerance("training loss"), atol=0)


def preferred(rank: int, world: int, stage: int) -> Any:
    """A sequence-level loss on gathered log-probabilities, and the same loss of one process."""
    from deepspeed.utils import safe_get_full_grad

    import longctx

    engine = make_engine(2, stage)
    rows = ragged_rows(3, 0, engine.mesh.data_rank)
    length = rows["input_ids"].shape[1]
    batch = engine.shard(rows)
    values = longctx.token_logprobs(engine(**batch).logits, batch["shift_labels"], engine.mesh, length=length)
    local = longctx.token_logprobs(engine(**batch).logits, batch["shift_labels"])
    assert torch.equal(engine.unshard(local, length=length), values)
    loss = torch.nn.functional.softplus(values[1].sum() - values[0].sum())  # not a sum over tokens
    engine.backward(loss, replicated=True)
    gradient = safe_get_full_grad(engine.module.lm_head.weight).clone()
    engine.step()
    found = engine.global_loss, gradient
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_preference_loss_on_gathered_log_probabilities(stage: int) -> None:
    from longctx.engine.rows import explicit_rows

    model, losses = tiny_llama(), []
    for replica in range(2):
        full = explicit_rows(ragged_rows(3, 0, replica))
        documents, length = full["document_ids"], full["input_ids"].shape[1]
        visible = (documents[:, :, None] == documents[:, None, :]) & torch.ones(length, length).tril().bool()
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
        logits = model(input_ids=full["input_ids"], position_ids=full["position_ids"], attention_mask=mask).logits
        labels = full["shift_labels"]
        values = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
        losses.append(torch.nn.functional.softplus(values[1].sum() - values[0].sum()))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradient = model.lm_head.weight.grad
    for found, got in run_ranks(4, preferred, stage):
        assert found == pytest.approx(float(loss.detach()), rel=tolerance("training loss"))
        assert (got - gradient).norm() <= tolerance("training gradient") * gradient.norm()

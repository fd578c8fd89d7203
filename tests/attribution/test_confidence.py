"""When an answer says nothing: each check on either side of its threshold, on stores whose losses
and rows are made by hand."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import Namespace
from torch import Tensor

from ctrak_lightning import Attribution, TraceStore, methods
from ctrak_lightning.attribution import diagnostics
from ctrak_lightning.attribution.attributions import Attributions
from ctrak_lightning.attribution.diagnostics import (
    BLIND,
    INDISTINCT,
    NOT_LEARNT,
    NOT_SHOWN,
    STILL,
    UNSTABLE,
    SelfCheck,
    neighbours,
)
from ctrak_lightning.capture.trace import FAINT
from ctrak_lightning.cli import main
from ctrak_lightning.cli.attribute import _print_result
from ctrak_lightning.store import TraceWriter

from ..store.store_builder import make_header, make_table
from .reporting import INK, THING, random_result, result_of, table_of

N, K = 10, 12
LOSSES = torch.linspace(0.1, 0.3, N)
ALIKE = torch.linspace(1, 2, N)[:, None] * torch.ones(N, K)
"""Rows of one direction: whatever is asked, the longest scores highest."""


def asked_of(
    path: Path,
    losses: list[Tensor],
    rows: Tensor | None = None,
    exposures: Tensor | None = None,
    **changes: Any,
) -> Attribution:
    """An answer of a store with these losses [N], rows [N, K] and exposures [N] at its checkpoints;
    sound but for what is given."""
    writer = TraceWriter(path, make_header(dim=K, dataset={"size": N}), run_id="run")
    writer.write_samples(make_table(N))
    for step, loss in enumerate(losses, start=1):
        with writer.begin_checkpoint(step, epoch=0, exposures=exposures) as checkpoint:
            checkpoint.append(torch.arange(N), torch.eye(N, K) if rows is None else rows, loss)
            checkpoint.seal()
    scores = torch.randn(N, generator=torch.Generator().manual_seed(1)).expand(len(losses), N)
    return result_of(scores, table_of(N, owner=["a", "b"] * 5), store=TraceStore(path), **changes)


def test_what_is_sound_is_not_doubted(tmp_path: Path) -> None:
    found = asked_of(tmp_path, [LOSSES, LOSSES * 0.9]).confidence
    assert (found.says_nothing, found.verdict, found.reasons, found.cautions) == (False, "", [], [])
    assert found.loss == pytest.approx(0.2 * 0.9)
    assert found.moved == pytest.approx(0.1)
    assert found.self_check is not None
    assert (found.self_check.first, found.self_check.asked) == (N, N)
    assert found.stability == pytest.approx(1)


def test_how_often_samples_were_trained_on_is_no_part_of_the_self_check(tmp_path: Path) -> None:
    """A sample that was seen a hundred times outscores others at their own question."""
    rows = torch.eye(N, K) + 0.2
    store = asked_of(tmp_path, [LOSSES], rows, torch.arange(1, N + 1) ** 3).store
    assert store is not None
    found = diagnostics.self_check(store.checkpoints, None, factors=("exposures",))
    assert (found.first, found.asked) == (N, N)


def test_equal_samples_are_first_together(tmp_path: Path) -> None:
    """An image that a data set has twice has the same trace, up to rounding."""
    rows = torch.eye(N // 2, K).repeat(2, 1) * (1 + 1e-6 * torch.arange(N))[:, None]
    other = rows.clone()
    other[0, -1] = 0.3  # and one that is no equal is not taken for one
    other[N // 2, -1] = 0.6
    for number, (each, first) in enumerate(((rows, N), (other, N - 1))):
        store = asked_of(tmp_path / str(number), [LOSSES], each).store
        assert store is not None
        assert diagnostics.self_check(store.checkpoints, None) == SelfCheck(first, N)


def test_only_what_was_trained_on_is_examined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = torch.arange(N) % 2
    losses = [torch.where(trained > 0, LOSSES, 9.0), torch.where(trained > 0, LOSSES * 0.9, 9.0)]
    asked = asked_of(tmp_path, losses, exposures=trained)
    scores = torch.stack([torch.linspace(1, 2, N), torch.linspace(2, 1, N)]) * trained
    found = replace(asked, checkpoint_scores=scores, exposures=trained.expand(2, N)).confidence
    kept = LOSSES[trained > 0] * 0.9
    assert found.loss == pytest.approx(float(kept.mean()))
    assert found.moved == pytest.approx(0.1)
    assert found.stability == pytest.approx(-1)
    main(["info", str(tmp_path)])
    assert capsys.readouterr().out.count(f"mean loss {float(kept.mean()):.4f}") == 1


@pytest.mark.parametrize(
    ("change", "says", "why"),
    [
        (
            {"strength": 0.99 * FAINT},
            NOT_LEARNT,
            "hardly tells “with the concept” from “without it”",
        ),
        ({"strength": 1.01 * FAINT}, "", ""),
        ({"strength": float("nan")}, "", ""),
        (
            {"losses": [LOSSES, torch.full((N,), 1.01 * BLIND)]},
            NOT_LEARNT,
            "hardly learnt to draw at all",
        ),
        ({"losses": [LOSSES, torch.full((N,), 0.99 * BLIND)]}, "", ""),
        ({"losses": [LOSSES, LOSSES]}, NOT_SHOWN, "it did not learn in between"),
        (
            {"losses": [LOSSES, LOSSES * (1 - 0.9 * STILL)]},
            NOT_SHOWN,
            "it did not learn in between",
        ),
        ({"losses": [LOSSES, LOSSES * (1 + 1.1 * STILL)]}, "", ""),
        ({"losses": [LOSSES]}, "", ""),
        (
            {"rows": ALIKE},
            NOT_SHOWN,
            f"Only 1 of {N} training images, taken as questions, rank themselves",
        ),
    ],
)
def test_each_check_on_either_side_of_its_threshold(
    tmp_path: Path, change: dict[str, Any], says: str, why: str
) -> None:
    found = asked_of(tmp_path, **{"losses": [LOSSES, LOSSES * 0.9], **change}).confidence
    assert found.verdict == says
    assert len(found.reasons) == bool(says)
    assert why in " ".join(found.reasons)


def test_the_share_of_the_self_check_and_the_agreement_have_thresholds_of_their_own() -> None:
    asked = 100
    for first, doubted in (
        (round(INDISTINCT * asked) - 1, True),
        (round(INDISTINCT * asked), False),
    ):
        assert bool(diagnostics._unshown(None, SelfCheck(first, asked))) is doubted
    (told,) = diagnostics._cautions(2, True, UNSTABLE - 1e-6)
    assert told.startswith("The rankings of the two halves of the checkpoints hardly agree")
    assert not diagnostics._cautions(2, True, UNSTABLE)
    assert not diagnostics._cautions(2, True, None)


def drawn(n: int, seed: int) -> Tensor:
    """Images [n, 3, 16, 16] in [0, 1] of smooth blobs."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (16, 16), mode="bilinear")


def test_an_image_of_noise_is_told_beside_the_training_images() -> None:
    n = 40
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(drawn(1, 7), (32, 32), mode="bilinear")[0]
    table = table_of(n)
    of_blobs = replace(table, thumbnails=(drawn(n, 1).permute(0, 2, 3, 1) * 255).byte())
    random = torch.randint(
        256, (n, 16, 16, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    scores = torch.randn(n, generator=torch.Generator().manual_seed(1)).expand(2, n)
    found = result_of(scores, of_blobs, image=noise).confidence
    assert found.verdict == NOT_LEARNT
    assert "The generated image is noise" in found.reasons[0]
    sound = [
        result_of(scores, of_blobs, image=smooth),
        result_of(
            scores, of_blobs, image=torch.ones(3, 32, 32)
        ),  # flat: nothing is learnt, but it is no noise
        result_of(scores, of_blobs, image=None),
        result_of(
            scores, replace(table, thumbnails=random), image=noise
        ),  # as the training images are
        result_of(scores, replace(table, thumbnails=None), image=noise),
        result_of(
            scores, of_blobs, image=noise, concept=replace(THING, image=noise)
        ),  # not the model's
    ]
    assert [each.confidence.verdict for each in sound] == [""] * len(sound)


def test_neighbours_are_numpys_correlation() -> None:
    image = torch.rand(1, 1, 9, 7, generator=torch.Generator().manual_seed(3)) + torch.arange(7.0)
    found = float(neighbours(image))
    pixels = image[0, 0].double().numpy() - image.double().mean().item()
    pairs = [(pixels[:, :-1], pixels[:, 1:]), (pixels[:-1], pixels[1:])]
    sizes = sum(((a**2).sum() + (b**2).sum()) / 2 for a, b in pairs)
    assert found == pytest.approx(sum((a * b).sum() for a, b in pairs) / sizes)
    assert float(neighbours(torch.ones(1, 3, 4, 4))) == 1.0


def test_losses_of_training_steps_are_not_held_against_the_scale_of_others(tmp_path: Path) -> None:
    result = asked_of(tmp_path, [5 * LOSSES, 5 * LOSSES], method=methods.inline_trak().to_dict())
    assert (result.confidence.loss, result.confidence.moved) == (None, None)
    assert not result.confidence.says_nothing


def test_a_store_is_read_once_for_all_concepts_of_a_damping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float | None] = []

    def counted(checkpoints: Any, damping: float | None, **_: Any) -> SelfCheck:
        asked.append(damping)
        return SelfCheck(1, 1)

    monkeypatch.setattr(diagnostics, "self_check", counted)
    result = asked_of(tmp_path, [LOSSES, LOSSES * 0.9])
    for each in (result, replace(result, seed=4), replace(result, damping=7.0)):
        assert each.confidence is each.confidence
    assert asked == [1.0, 7.0]
    replace(result, store=TraceStore(tmp_path)).confidence  # noqa: B018
    assert len(asked) == 3


def test_exports_of_several_concepts_say_it_first(tmp_path: Path) -> None:
    sound = random_result(6)
    faint = replace(sound, concept=INK, strength=FAINT / 2)
    several = Attributions([sound, faint], torch.eye(2))
    several.to_csv(tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["verdict thing", "verdict ink", "sample_id"]
    assert {(row["verdict thing"], row["verdict ink"]) for row in rows} == {("", NOT_LEARNT)}
    several.to_json(tmp_path / "t.json", 3)
    document = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert [each["confidence"]["says_nothing"] for each in document["concepts"]] == [False, True]
    assert several.table(3).splitlines()[0] == f"ink: {NOT_LEARNT}"


def test_the_command_line_says_it_first_and_withholds_shares(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = Namespace(top=2, group="owner")
    _print_result(random_result(6, strength=FAINT / 2), args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"thing: {NOT_LEARNT}"
    assert "no shares by owner" in lines[-1]
    assert "%" not in "".join(lines)
    _print_result(random_result(6), args)
    lines = capsys.readouterr().out.splitlines()
    assert "Look at the generated image first" in lines[0]
    assert "share by owner" in lines[-4]
    lowest = random_result(6, checkpoints=2)
    _print_result(replace(lowest, checkpoint_scores=-torch.ones(2, 6)), args)
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "no shares by owner: no sample has a positive score"
    )

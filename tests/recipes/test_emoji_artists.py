import json
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch

from ctrak_lightning import Capture, GradientTracer, Projection, TraceStore, methods
from ctrak_lightning.attribution.baselines import label_search
from ctrak_lightning.provenance import Ledger, verify
from ctrak_lightning.store import SampleTable
from ctrak_lightning.tasks import resolve_task
from ctrak_lightning.utilities.rng import seeded_noise
from recipes.benchmarks.judge import EmojiJudge, denoising_losses
from recipes.benchmarks.replay import replay, save_trained, saved_steps
from recipes.benchmarks.retrain import plan
from recipes.emoji_artists.data import KINDS, NEW_ARTISTS, Emoji, EmojiArtists
from recipes.emoji_artists.demo import main
from recipes.emoji_artists.evaluate import chance, questions, r_precision
from recipes.emoji_artists.module import EmojiDiffusion
from recipes.emoji_artists.network import patchify, unpatchify

from ..toy import ToyData, ToyDiffusion


def test_the_splits_share_no_object_and_hold_one_pair_per_object_out() -> None:
    base, new = EmojiArtists("base"), EmojiArtists("new")
    base_pairs, new_pairs = set(base.train_set.pairs), set(new.train_set.pairs)
    assert (len(base_pairs), len(new_pairs), len(new.held_out)) == (2400, 448, 64)
    assert not {name for name, _ in base_pairs} & {name for name, _ in new_pairs}
    assert not {artist for _, artist in base_pairs} & set(NEW_ARTISTS)
    assert not new_pairs & set(new.held_out)
    assert len({name for name, _ in new.held_out}) == 64
    per_artist = [sum(a == artist for _, a in new.held_out) for artist in Emoji.load().artists]
    assert per_artist == [8] * 8
    emoji = Emoji.load()
    item = new.train_set[5]
    pixels = emoji.images[emoji.objects.index(item["object"]), emoji.artists.index(item["artist"])]
    assert torch.equal(
        ((item["image"] + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(pixels)
    )
    with pytest.raises(ValueError, match="unknown.*Known: noto"):
        EmojiArtists("new", ["nota"])


def test_r_precision_by_hand() -> None:
    samples = SampleTable(
        ["a", "b", "c", "d", "e"],
        [""] * 5,
        {"object": ["owl", "owl", "cat", "cat", "owl"], "artist": ["x", "y", "x", "y", "z"]},
    )
    asked = questions([("owl", "x")])
    assert [question.kind for question in asked] == list(KINDS)
    scores = [torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 9.0, 2.0, 0.0, -1.0])]
    found = r_precision(asked, scores, samples)
    assert found["object"] == pytest.approx(2 / 3)  # owls: a, b, e; the top three are a, b, c
    assert found["artist"] == pytest.approx(1 / 2)  # of x: a, c; the top two are b, c
    assert chance(asked, samples) == pytest.approx({"object": 3 / 5, "artist": 2 / 5})
    best = list(label_search([question.concept() for question in asked], samples))
    assert r_precision(asked, best, samples) == {"object": 1.0, "artist": 1.0}


def test_lora_trains_the_adapter_and_the_new_tokens_only() -> None:
    module = EmojiDiffusion("lora")
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    tokens = {"denoiser.artist.new.weight", "denoiser.object.new.weight"}
    assert tokens < trained
    assert all("lora_" in name for name in trained - tokens)
    traced = GradientTracer(module.denoiser, Projection(rank=2, dim=8)).parameter_names
    assert {f"denoiser.{name}" for name in traced} == trained
    assert len(module.known_attributes()["object"]) == 464
    full = EmojiDiffusion("full")
    assert all(p.requires_grad for p in full.parameters())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(unpatchify(patchify(images)), images)


def test_a_fine_tunes_learning_rate_warms_up_and_falls_to_zero() -> None:
    class Watch(L.Callback):
        rates: ClassVar[list[float]] = []

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    data = EmojiArtists("new", kept=list(range(20)), batch_size=2)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar"), False
    )
    quiet["enable_model_summary"] = False
    module = EmojiDiffusion("lora", learning_rate=1.0, token_learning_rate=0.0, warmup_steps=4)
    L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[Watch()], **quiet).fit(
        module, datamodule=data
    )
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.9, 0.6, 0.3]
    assert Watch.rates == pytest.approx(expected)


def test_dropped_tokens_are_the_null_token() -> None:
    module = EmojiDiffusion("lora")
    both = module.condition({"object": "owl", "artist": "noto"}, 1)
    artist = module.condition({"artist": "noto"}, 1)
    null = module.condition({}, 1)
    assert both["artist"] == artist["artist"] != null["artist"]
    assert artist["object"] == null["object"] != both["object"]
    words = module.denoiser.object
    assert torch.equal(words(null["object"])[0].flatten(), words.null.weight[0])
    new = list(words.index).index("tangerine") - words.base.num_embeddings
    assert torch.equal(words(words.indices(["tangerine"]))[0].flatten(), words.new.weight[new])
    assert torch.equal(
        words(words.indices(["owl"]))[0].flatten(),
        words.base.weight[list(words.index).index("owl")],
    )


def test_the_tokens_gradients_are_traced_exactly() -> None:
    module = EmojiDiffusion("lora").eval()
    data = EmojiArtists("new")
    x, t = patchify(data.train_set.images[:3]), torch.tensor([100, 500, 900])
    names = (
        module.condition({"object": "owl", "artist": "twemoji"}, 1),
        module.condition({"object": "tangerine"}, 2),
    )
    condition = {kind: torch.cat([part[kind] for part in names]) for kind in ("artist", "object")}
    features = []
    for engine in ("hooks", "loop"):
        tracer = GradientTracer(
            module.denoiser, Projection(rank=8, dim=None), layers=["*new"], engine=engine
        )

        def forward(rows: torch.Tensor) -> torch.Tensor:
            return module.predict(
                x[rows], t[rows], {kind: value[rows] for kind, value in condition.items()}
            )

        features += tracer.vjps(forward, [lambda e, rows: e.detach()], 3)
    torch.testing.assert_close(features[0], features[1], rtol=1e-4, atol=1e-5)
    assert (features[0].norm(dim=1) > 0).all()


def test_hidden_tokens_are_a_third_of_every_concept_and_never_reach_the_network() -> None:
    data = EmojiArtists("new", setting="hidden")
    pairs, told = data.train_set.pairs, data.train_set.told
    for axis in (0, 1):
        for name in {pair[axis] for pair in pairs}:
            rows = [i for i, pair in enumerate(pairs) if pair[axis] == name]
            assert sum(told[i][axis] == "" for i in rows) == len(rows) // 3
            assert all(told[i][axis] in ("", name) for i in rows)
    i = next(i for i in range(len(pairs)) if told[i][0] == "" and told[i][1] != "")
    batch = torch.utils.data.default_collate([data.train_set[i]])
    assert batch["object"] == [pairs[i][0]]
    module = EmojiDiffusion("lora")
    assert module.encode(batch).condition == module.condition({"artist": pairs[i][1]}, 1)
    assert pairs[i][0] not in batch["caption"][0]


def test_wrong_tokens_are_a_tenth_of_the_images_for_each_kind() -> None:
    data = EmojiArtists("new", setting="mislabelled")
    pairs, told = data.train_set.pairs, data.train_set.told
    wrong = [{i for i in range(448) if told[i][axis] != pairs[i][axis]} for axis in (0, 1)]
    assert [len(rows) for rows in wrong] == [44, 44]
    assert not wrong[0] & wrong[1]
    assert {told[i][0] for i in wrong[0]} <= {name for name, _ in pairs}
    assert EmojiArtists("new").train_set.told == pairs
    with pytest.raises(ValueError, match="expected one of.*hidden"):
        EmojiArtists("new", setting="secret")  # type: ignore[arg-type]


def test_training_sees_the_kept_images_only_and_tracing_all() -> None:
    data = EmojiArtists("new", kept=list(range(64)), batch_size=16)
    seen = {name for batch in data.train_dataloader() for name in batch["sample_id"]}
    assert seen == {data.train_set[i]["sample_id"] for i in range(64)}
    assert sum(len(batch["sample_id"]) for batch in data.trace_dataloader()) == 448


def test_retraining_plans_leave_out_what_they_say() -> None:
    data = EmojiArtists("new", setting="hidden")
    pairs, told = data.train_set.pairs, data.train_set.told
    halves = plan("half", data)
    assert len({tuple(run.kept) for run in halves}) == len(halves) == 32
    assert all(len(run.kept) == 224 == len(set(run.kept)) for run in halves)
    assert halves == plan("half", data)
    by_artist = [{pairs[i][1] for i in run.kept} for run in plan("artist-half", data)]
    assert [len(artists) for artists in by_artist] == [4] * 16
    assert len({frozenset(artists) for artists in by_artist}) == 16
    assert all(
        sum(artist in artists for artists in by_artist) == 8 for artist in Emoji.load().artists
    )
    assert sorted(plan("artist-half", data)[0].kept + plan("artist-half", data)[1].kept) == list(
        range(448)
    )
    runs = {run.name: set(run.kept) for run in plan("without-artist", data)}
    assert len(runs) == 8
    left_out = set(range(448)) - runs["without-artist-openmoji"]
    assert left_out == {i for i, pair in enumerate(pairs) if pair[1] == "openmoji"}
    runs = {run.name: set(run.kept) for run in plan("without-hidden", data)}
    left_out = set(range(448)) - runs["without-hidden-openmoji"]
    assert left_out == {i for i in range(448) if pairs[i][1] == "openmoji" and told[i][1] == ""}
    data = EmojiArtists("new", setting="mislabelled")
    runs = {run.name: set(run.kept) for run in plan("without-wrong", data)}
    left_out = set(range(448)) - runs["without-wrong-openmoji"]
    pairs, told = data.train_set.pairs, data.train_set.told
    assert left_out == {i for i in range(448) if told[i][1] == "openmoji" != pairs[i][1]}
    with pytest.raises(ValueError, match="no such images"):
        plan("without-wrong", EmojiArtists("new"))
    with pytest.raises(ValueError, match="unknown. Known: full"):
        plan("quarter", data)


def test_the_judge_knows_the_real_drawings_and_doubts_others() -> None:
    data = EmojiArtists("new")
    images = (data.held_out_set.images + 1) / 2
    objects, artists = [name for name, _ in data.held_out], [artist for _, artist in data.held_out]
    judge = EmojiJudge.trained()
    right = judge.log_odds(images, objects, artists)
    wrong = judge.log_odds(images, objects[1:] + objects[:1], artists[1:] + artists[:1])
    assert (right[:, 0] > 0).float().mean() > 0.95
    assert (right[:, 1] > 0).float().mean() > 0.9
    assert (wrong < 0).float().mean() > 0.95
    grey = judge.log_odds(torch.full((1, 3, 32, 32), 0.5), objects[:1], artists[:1])
    assert grey.isfinite().all()
    logits = judge(images[:1])[0].double().softmax(1)
    p = logits[0, Emoji.load().objects.index(objects[0])]
    assert float(right[0, 0]) == pytest.approx(float(torch.log(p / (1 - p))), rel=1e-3)


def test_denoising_losses_are_those_of_the_four_conditions() -> None:
    module, data = EmojiDiffusion("lora").eval(), EmojiArtists("new")
    images, pairs = data.held_out_set.images[:3], data.held_out[:3]
    found = denoising_losses(module, images, pairs)
    name, artist = pairs[1]
    told = [{"object": name, "artist": artist}, {"artist": artist}, {"object": name}, {}]
    latents = patchify(images[1:2])
    for column, spec in enumerate(told):
        losses = []
        for t in (50, 150, 250, 350, 450, 550, 650, 750, 850, 950):
            noise = seeded_noise((48, 8, 8), 0, t, "")[None]
            timestep = torch.tensor([t])
            x_t = module.noise_schedule.add_noise(latents, noise, timestep)
            with torch.no_grad():
                losses.append(
                    (module.predict(x_t, timestep, module.condition(spec, 1)) - latents)
                    .square()
                    .mean()
                )
        assert float(found[1, column]) == pytest.approx(float(sum(losses)) / 10, rel=1e-4)


class Carries(torch.nn.Module):
    """A module with a task, as those that use DiffusersTask."""

    def __init__(self) -> None:
        super().__init__()
        self.task = ToyDiffusion()


@pytest.mark.parametrize("kind", [ToyDiffusion, Carries])
def test_a_replayed_run_has_the_traces_of_the_run_itself(kind: type, tmp_path: Path) -> None:
    module, data = kind(), ToyData()
    task = resolve_task(module)
    method, projection = methods.trak(timesteps=2), Projection(rank=4, dim=64)
    save_trained(module, tmp_path, 3)
    tracer = GradientTracer(task.denoiser, projection)
    loader = torch.utils.data.DataLoader(data.toys, 4)
    live = Capture(
        str(tmp_path / "live"), module, task, loader, method=method, tracer=tracer, progress=False
    )
    live.run(3, epoch=0, learning_rate=0.5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    store = replay(
        tmp_path,
        module,
        loader,
        method,
        tmp_path / "again",
        projection=projection,
        learning_rate=0.5,
    )
    expected = TraceStore(tmp_path / "live").checkpoints[0]
    assert saved_steps(tmp_path) == [c.step for c in store.checkpoints] == [3]
    assert torch.equal(store.checkpoints[0].features(), expected.features())
    assert store.checkpoints[0].learning_rate == 0.5
    before = (tmp_path / "again" / "manifest.json").stat().st_mtime_ns
    replay(tmp_path, module, loader, method, tmp_path / "again", projection=projection)
    assert (tmp_path / "again" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_demo_runs_and_reports_what_it_did(tmp_path: Path) -> None:
    main(["--out", str(tmp_path / "demo"), "--epochs", "3", "--artists", "noto,openmoji"])
    assert len(list((tmp_path / "demo" / "sheets").glob("*.png"))) == 64
    facts = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert facts["r_precision"]["label_search"] == {"object": 1.0, "artist": 1.0}
    for name in ("influence", "concept_trak", "concept_trak_paper", "trak"):
        store = TraceStore(tmp_path / "demo" / "traces" / name)
        assert (len(store), [c.step for c in store.checkpoints]) == (64, [2, 4, 6])
        assert store.verify() == []
    traces = tmp_path / "demo" / "traces" / "influence"
    questions_asked = [entry for entry in Ledger(traces).entries() if entry.kind == "query"]
    assert len(questions_asked) == 130  # both concepts of 64 pairs, and the page's two
    assert verify(traces) == []
    page = (tmp_path / "demo" / "report.html").read_text("utf-8")
    assert Ledger(traces).entries()[-1].sha256 in page
    with pytest.raises(ValueError, match="holds other files"):
        main(["--out", str(Path(__file__).parent)])


def test_images_and_masks_become_patches() -> None:
    module = EmojiDiffusion("none")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(unpatchify(module.latents(images)), images)
    mask = torch.zeros(32, 32)
    mask[5:11, :7] = 1
    weights = module.latent_mask(mask)
    assert torch.equal(unpatchify(weights[None])[0], mask.expand(3, -1, -1))

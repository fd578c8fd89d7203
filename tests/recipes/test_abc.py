"""The AbC recipe on a stand-in in the published layout, with a tiny Stable-Diffusion-like model of random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from ctrak_lightning import (
    Attributor,
    Capture,
    Concept,
    GradientTracer,
    Projection,
    Sampler,
    TraceStore,
    methods,
)
from recipes.abc import benchmark, components
from recipes.abc.components import load_components
from recipes.abc.data import (
    AbC,
    Customisation,
    read_captions,
    read_pool,
    read_tasks,
    read_test_case,
    without_token,
)
from recipes.abc.module import CustomDiffusion, ExtendedEmbedding
from recipes.benchmarks.replay import load_trained
from tests.recipes.test_celeba_hq import picture

SIZE = 16
POOL = 12


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(bool(seed & 1), bool(seed & 2), bool(seed & 4), seed)).save(path)


def entry(case: str, name: str, exemplars: int) -> dict[str, Any]:
    return {
        "exemplar": [f"dataset/exemplar/{case}/images/{name}/{i}.jpg" for i in range(exemplars)],
        "synth": {
            "gpt": [f"dataset/synth/{case}/gpt/{name}/samples/{i:05d}.png" for i in range(3)],
            "object": [f"dataset/synth/{case}/object/{name}/samples/{i:05d}.png" for i in range(2)],
        },
        "class_id": name,
        "category": None,
    }


def query(case: str, index: int, name: str, number: int, prompt: str) -> dict[str, Any]:
    return {
        "synth_image_path": f"synth/{case}/gpt/{name}/samples/{number:05d}.png",
        "prompt": prompt,
        "test_case": f"test_{case}",
        "test_case_ind": index,
        "model_path": f"models/{case}/{name}",
        "train_prompt": "A picture in the style of <new1> art",
        "category": "art",
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test cases; the second model of ``artchive`` has three exemplars, the only one of ``bamfg`` has two."""
    folder = tmp_path_factory.mktemp("abc")
    cases = {
        "artchive": [entry("artchive", "ardon", 1), entry("artchive", "klee", 3)],
        "bamfg": [entry("bamfg", "x", 2)],
    }
    (folder / "json").mkdir()
    seed = 0
    for case, entries in cases.items():
        (folder / "json" / f"test_{case}.json").write_text(json.dumps(entries))
        for path in (p for item in entries for p in item["exemplar"]):
            write_image(folder / path.removeprefix("dataset/"), seed := seed + 1)
    for i in range(POOL):
        write_image(folder / "laion_subset" / f"{i:07d}.png", 100 + i)
    tasks = [
        query("artchive", 1, "klee", 0, "The sea in the style of <new1> art"),
        query("bamfg", 0, "x", 0, "The sea in the style of <new1> art"),
        query("artchive", 1, "klee", 1, "A fish in the style of <new1> art"),
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in diffusers' layout: every part random and tiny, the tokenizer spells words out letter by letter."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("model")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=40).save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=40,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")
        UNet2DConditionModel(
            sample_size=SIZE // 2,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
        ).save_pretrained(folder / "vae")
    DDIMScheduler(num_train_timesteps=100, clip_sample=True).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def task(root: Path) -> Customisation:
    return read_tasks(root, root / "tasks.json")[0]


@pytest.fixture
def module(model: Path, task: Customisation) -> CustomDiffusion:
    return CustomDiffusion(load_components(str(model)), task.train_prompt).eval()


def data_of(root: Path, task: Customisation, pool: int = POOL) -> AbC:
    paths = read_pool(root, pool, 0)
    return AbC(root, task, paths, {p: f"image {p[-5]}" for p in paths}, SIZE, 4, 4)


def test_a_test_case_is_read_as_it_is_published(root: Path) -> None:
    first, second = read_test_case(root, "test_artchive")
    assert (first.name, first.index, second.name, second.index) == ("ardon", 0, "klee", 1)
    assert second.exemplars == tuple(f"exemplar/artchive/images/klee/{i}.jpg" for i in range(3))
    assert "synth/artchive/object/klee/samples/00001.png" in second.synthesised
    assert len(second.synthesised) == 5
    with pytest.raises(
        FileNotFoundError, match="test_imagenet.json: no such file; expected <root>/json/<test case>"
    ):
        read_test_case(root, "test_imagenet")


def test_tasks_are_grouped_by_model_and_cut_in_their_order(root: Path) -> None:
    klee, x = read_tasks(root, root / "tasks.json")
    assert (klee.entry.folder, x.entry.folder) == ("test_artchive-0001", "test_bamfg-0000")
    assert klee.prompts == ("The sea in the style of <new1> art", "A fish in the style of <new1> art")
    assert klee.train_prompt == "A picture in the style of <new1> art"
    [only] = read_tasks(root, root / "tasks.json", models=1, queries=1)
    assert (only.entry.name, only.prompts) == ("klee", klee.prompts[:1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_case_ind": 0}, r"query 0 is said to be of entry 0 .*does not list synth/artchive/gpt/klee"),
        ({"test_case_ind": 2}, "entry 2 of test_artchive .2 entries."),
        ({"prompt": "The sea"}, "'The sea' lacks the token <new1>"),
        ({"prompt": None, "test_case": None}, "test case|no such file"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(
    root: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    item = query("artchive", 1, "klee", 0, "The sea in the style of <new1> art") | changed
    (tmp_path / "tasks.json").write_text(json.dumps([item]))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_tasks(root, tmp_path / "tasks.json")


def test_damaged_files_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    path = tmp_path / "json" / "test_a.json"
    for text, message in (
        ("{", "test_a.json: no valid JSON"),
        ("{}", "expected a list with an object"),
        (json.dumps([{"exemplar": []}]), "entry 0 is not of the published form .KeyError.'synth'"),
        (json.dumps([entry("a", "b", 0)]), r"entry 0 \(b\) has no exemplar.*no positive sample"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_test_case(tmp_path, "test_a")
    (tmp_path / "tasks.json").write_text('[{"prompt": "x"}]')
    with pytest.raises(ValueError, match="query 0 is not of the published form"):
        read_tasks(root, tmp_path / "tasks.json")
    item = query("artchive", 1, "klee", 0, "a <new1>")
    (tmp_path / "tasks.json").write_text(json.dumps([item, item | {"train_prompt": "<new1> fish"}]))
    with pytest.raises(ValueError, match="two captions for its exemplars"):
        read_tasks(root, tmp_path / "tasks.json")


def test_the_counter_condition_is_the_prompt_without_the_token() -> None:
    assert without_token("A school of <new1> fish swimming") == "A school of fish swimming"
    assert without_token("<new1>") == ""
    with pytest.raises(ValueError, match="'a fish' lacks the token <new1>"):
        without_token("a fish")


def test_a_question_is_its_prompt_against_the_same_without_the_token(task: Customisation) -> None:
    first, second = benchmark.concepts(task)
    assert (first.present, first.absent) == (task.prompts[0], "The sea in the style of art")
    assert (second.present, second.absent) == (task.prompts[1], "A fish in the style of art")
    assert first.isolated().present == task.train_prompt


def test_the_pool_is_a_seeded_choice_with_captions(root: Path, tmp_path: Path) -> None:
    some, again, other = (read_pool(root, 5, seed) for seed in (1, 1, 2))
    assert some == again != other
    assert some == sorted(set(some))
    assert set(some) < set(read_pool(root, None, 0))
    assert len(read_pool(root, None, 0)) == POOL
    with pytest.raises(ValueError, match="12 images, asked for 13"):
        read_pool(root, 13, 0)
    with pytest.raises(FileNotFoundError, match="laion_subset: no such folder; expected"):
        read_pool(tmp_path, 1, 0)
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({Path(name).name: f"caption of {name}" for name in some[1:]}))
    assert read_captions(path, some[1:])[some[1]] == f"caption of {some[1]}"
    with pytest.raises(ValueError, match=r"no caption for 1 of 5 pool images, the first \['laion.*HINT"):
        read_captions(path, some)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_captions(path, some)


def test_exemplars_are_traced_before_the_pool_and_alone_trained_on(root: Path, task: Customisation) -> None:
    data = data_of(root, task, 5)
    traced = [name for batch in data.trace_dataloader() for name in batch["sample_id"]]
    assert traced[:3] == list(task.entry.exemplars)
    assert len(traced) == 8
    assert data.relevant().tolist() == [True] * 3 + [False] * 5
    kinds = [kind for batch in data.trace_dataloader() for kind in batch["kind"]]
    assert kinds == ["exemplar"] * 3 + ["pool"] * 5
    batches = list(data.train_dataloader())
    assert len(batches) == data.steps
    assert {name for batch in batches for name in batch["sample_id"]} <= set(task.entry.exemplars)
    assert {text for batch in batches for text in batch["caption"]} == {task.train_prompt}
    with pytest.raises(
        FileNotFoundError, match="1 of 4 images are missing, the first .*absent.png.*expected <root>"
    ):
        AbC(root, task, ["laion_subset/absent.png"], {"laion_subset/absent.png": ""}, SIZE, 4, 4)
    with pytest.raises(ValueError, match="exemplars and pool at once"):
        AbC(root, task, [task.entry.exemplars[0]], {}, SIZE, 4, 4)


def test_a_model_folder_that_lacks_a_part_and_a_missing_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unet").mkdir()
    with pytest.raises(
        FileNotFoundError, match="lacks vae, text_encoder, tokenizer, scheduler; expected a folder"
    ):
        load_components(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        components._transformers()


def test_latents_are_not_clipped_whatever_the_scheduler_says(module: CustomDiffusion) -> None:
    assert module.noise_schedule.clip is None  # the stand-in's scheduler was saved with clip_sample=True


def test_only_keys_values_and_the_token_are_trained_and_all_of_that_is_traced(
    module: CustomDiffusion,
) -> None:
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    token = {name for name in trained if name.endswith("new.weight")}
    assert len(token) == 1
    assert trained - token
    assert all("attn2.to_k" in name or "attn2.to_v" in name for name in trained - token)
    traced = GradientTracer(module.denoiser, Projection(rank=2, dim=8)).parameter_names
    assert {f"denoiser.{name}" for name in traced} == trained


def test_the_token_starts_at_the_mean_of_the_other_words(model: Path) -> None:
    parts = load_components(str(model))
    ids = parts.tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2  # the tokenizer spells
    expected = parts.text_encoder.get_input_embeddings().weight[ids].mean(0)
    module = CustomDiffusion(parts, "<new1> ab")
    assert torch.equal(module.embedding.new.weight[0], expected)
    with pytest.raises(ValueError, match="knows <new1> already"):
        CustomDiffusion(parts, "<new1> ab")
    with pytest.raises(ValueError, match="no word beside <new1>"):
        CustomDiffusion(load_components(str(model)), "<new1>")


def test_an_extended_embedding_changes_the_new_token_only() -> None:
    base = torch.nn.Embedding(4, 3)
    extended = ExtendedEmbedding(base, 4, torch.tensor([7.0, 8.0, 9.0]))
    found = extended(torch.tensor([[0, 4], [3, 1]]))
    assert found[0, 1].tolist() == [7.0, 8.0, 9.0]
    assert torch.equal(found[1], base.weight[[3, 1]])
    found.sum().backward()
    assert extended.new.weight.grad is not None
    assert extended.new.weight.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_conditions_are_prompts(module: CustomDiffusion) -> None:
    both = module.condition("a <new1> fish", 2)["input_ids"]
    token = module.embedding.token_id
    assert (both == token).sum(1).tolist() == [1, 1]
    without = module.condition("a fish", 1)["input_ids"]
    assert both[0][both[0] != token].tolist() == without[0][: both.shape[1] - 1].tolist()
    assert torch.equal(module.condition({}, 3)["input_ids"], module.condition("", 3)["input_ids"])
    with pytest.raises(TypeError, match="'object': 'fish'.*expected a prompt"):
        module.condition({"object": "fish"}, 1)


def test_encode_is_deterministic_and_decode_is_its_counterpart(
    root: Path, task: Customisation, module: CustomDiffusion
) -> None:
    batch = next(iter(data_of(root, task).trace_dataloader()))
    first, again = module.encode(batch), module.encode(batch)
    assert first.latents.shape == (4, 4, SIZE // 2, SIZE // 2)
    assert torch.equal(first.latents, again.latents)
    assert first.metadata["kind"] == ["exemplar"] * 3 + ["pool"]
    decoded = module.decode(first.latents)
    scale = module.vae.config.scaling_factor
    expected = ((module.vae.decode(first.latents / scale).sample + 1) / 2).clamp(0, 1)
    assert decoded.shape == batch["image"].shape
    torch.testing.assert_close(decoded, expected)


def test_batched_traces_equal_the_loop_over_samples(
    root: Path, task: Customisation, module: CustomDiffusion
) -> None:
    """The token's gradient passes through the text encoder, where hooks see token positions."""
    batch = next(iter(data_of(root, task).trace_dataloader()))
    encoded = module.encode(batch)
    t = torch.tensor([10, 40, 60, 90])

    def forward(rows: Tensor) -> Tensor:
        return module.predict(
            encoded.latents[rows], t[rows], {"input_ids": encoded.condition["input_ids"][rows]}
        )

    projection = Projection(rank=3, dim=None)
    hooked = GradientTracer(module.denoiser, projection).vjps(forward, [lambda e, rows: e], 4)[0]
    looped = GradientTracer(module.denoiser, projection, engine="loop").vjps(forward, [lambda e, rows: e], 4)[
        0
    ]
    torch.testing.assert_close(hooked, looped, rtol=1e-3, atol=1e-4 * float(looped.abs().max()))
    token = GradientTracer(module.denoiser, projection, layers=["*.new"]).vjps(
        forward, [lambda e, rows: e], 4
    )[0]
    # An exemplar's caption has the token; a pool image's has not, so it cannot have taught its vector.
    assert (token[:3].norm(dim=1) > 0).all()
    assert float(token[3].norm()) == 0


def test_recall_by_hand() -> None:
    relevant = torch.tensor([True] * 12 + [False] * 8)
    scores = torch.arange(20.0).flip(0).unsqueeze(0)  # all twelve exemplars first
    found = benchmark.figures(scores, relevant)
    assert float(found["recall@10"]) == 1
    assert float(found["recall@10 of all"]) == pytest.approx(10 / 12)
    assert float(found["mAP"]) == 1
    few = torch.tensor([True, True, True] + [False] * 17)
    scores = torch.tensor([[20.0, 0.5, 11.5, *range(1, 18)]])
    # Of three exemplars the ten best hold two, at ranks 1 and 8; the third is last.
    found = benchmark.figures(scores, few)
    assert float(found["recall@10"]) == pytest.approx(2 / 3)
    assert float(found["recall@10 of all"]) == pytest.approx(2 / 3)
    assert float(found["mAP"]) == pytest.approx((1 + 2 / 8 + 3 / 20) / 3)
    with pytest.raises(ValueError, match="no relevant sample"):
        benchmark.figures(scores, torch.zeros(20, dtype=torch.bool))


def test_models_are_joined_query_by_query() -> None:
    a, b = {"recall@10": torch.tensor([0.0, 0.5])}, {"recall@10": torch.tensor([1.0])}
    found = benchmark.joined([("x", a), ("y", b)])
    assert found["recall@10"].tolist() == [0.0, 0.5, 1.0]
    assert found["recall@10, x"].tolist() == [0.0, 0.5]
    assert "recall@10, y" not in found  # one query has no interval


def test_rows_leave_out_layers_that_are_not_trained() -> None:
    names = [row.name for row in benchmark.rows([1, 2], None)]
    assert {"concept_trak_paper", "trak", "d_trak", "das"} <= set(names)
    assert not [name for name in names if "without_keys" in name or "given" in name]
    with pytest.raises(ValueError, match="trace no layer that is trained here"):
        benchmark.rows([1], ["concept_trak_norm_without_keys_and_values"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_attributor_asks_by_prompt(
    tmp_path: Path, root: Path, task: Customisation, module: CustomDiffusion
) -> None:
    method = methods.d_trak(1)
    tracer = GradientTracer(module.denoiser, Projection(rank=2, dim=16))
    capture = Capture(
        str(tmp_path / "s"),
        module,
        module,
        data_of(root, task, 5).trace_dataloader(),
        method=method,
        tracer=tracer,
    )
    capture.run(1, epoch=0)
    concept = Concept("style", task.prompts[0], without_token(task.prompts[0]), alone=task.train_prompt)
    attributor = Attributor(TraceStore(tmp_path / "s"), module, sampler=Sampler(steps=2))
    found = attributor.attribute(concept, seed=3)
    assert found.scores.shape == (8,)
    assert found.image is not None
    assert found.image.shape == (3, SIZE, SIZE)
    everywhere = attributor.score(attributor.query_global([concept], images=1))[0]
    assert not torch.allclose(everywhere.scores, found.scores)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_benchmark_from_the_files_to_the_table(
    root: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "TIMESTEPS", 1)
    command = ["--root", str(root), "--tasks", str(root / "tasks.json"), "--model", str(model)]
    command += ["--pool", "10", "--size", str(SIZE), "--steps", "2", "--sampling-steps", "2"]
    command += ["--methods", "d_trak"]
    command += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    benchmark.main(command)
    facts = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    assert facts["exemplars"] == {"test_artchive-0001": 3, "test_bamfg-0000": 2}
    assert (facts["queries"], facts["pool"], facts["captions"]) == (3, 10, False)
    rows = facts["rows"]
    assert set(rows) == {"d_trak", "caption_search", "pixel_similarity", "chance"}
    assert rows["caption_search"]["recall@10"]["mean"] == 1
    # Ten of 13 images for three exemplars, ten of 12 for two: chance by hand, over the two queries and the one.
    assert rows["chance"]["recall@10"]["mean"] == pytest.approx((10 / 13 + 10 / 13 + 10 / 12) / 3)
    # A warning to readers of the table, told in README.md: random weights, tuned for two steps, have learnt nothing, and the
    # token in the captions alone lets D-TRAK rank every exemplar first.
    assert rows["chance"]["mAP"]["mean"] < 0.3
    assert rows["d_trak"]["mAP"]["mean"] > 0.9
    # The same figure again, one query at a time from the finished traces.
    klee = read_tasks(root, root / "tasks.json")[0]
    folder = tmp_path / "runs" / klee.entry.folder
    again = CustomDiffusion(load_components(str(model)), klee.train_prompt).eval()
    load_trained(again, folder, 2)
    stores = {
        store.header.method["name"]: store
        for store in (TraceStore(path.parent) for path in folder.glob("answers-*/traces/*/finished-*"))
    }
    attributor = Attributor(
        stores["d_trak"], again, method=methods.d_trak(1), sampler=Sampler(steps=2, guidance=6.0)
    )
    recalls = []
    for seed, prompt in enumerate(klee.prompts):
        best = attributor.attribute(Concept("klee", prompt, without_token(prompt)), seed).top(10)
        recalls.append(sum(record.metadata["kind"] == "exemplar" for record in best) / 3)
    assert rows["d_trak"]["recall@10, test_artchive"]["mean"] == pytest.approx(sum(recalls) / 2)
    assert (folder / "queries.png").exists()
    written = {path: path.stat().st_mtime_ns for path in folder.glob("step-*.safetensors")}
    assert len(written) == 2
    benchmark.main(command)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert json.loads((tmp_path / "results" / "benchmark.json").read_text()) == facts
    with pytest.raises(ValueError, match="holds a run with .*'steps': 2.*HINT: name a new folder"):
        benchmark.main([*command, "--steps", "3"])


def test_images_of_the_stand_in_differ() -> None:
    assert len({picture(True, False, True, noise=i).tobytes() for i in range(3)}) == 3
    assert np.array_equal(picture(True, False, True, noise=1), picture(True, False, True, noise=1))

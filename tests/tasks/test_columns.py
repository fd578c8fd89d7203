"""The columns of a batch: token numbers, and latents and prompts that were encoded before;
tuples."""

import pytest
import torch

from ctrak_lightning import DiffusersTask
from ctrak_lightning.errors import BatchError, TaskError
from ctrak_lightning.tasks import encode
from recipes.tiny import clip_tokenizer, t5_tokenizer
from tests.tasks.tiny import SIZE, TOKENS, batch, build, task_of


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "sd35", "flux", "pixart"])
def test_tokens_and_embeddings_made_before_stand_for_captions(name: str) -> None:
    task = task_of(name)
    rows = batch(3)
    expected = task.encode(rows).condition
    tokenizers = {
        "sd1": "c",
        "sdxl": "cc",
        "sd3": "cct",
        "sd35": "cc",
        "flux": "ct",
        "pixart": "t",
    }[name]
    columns = {}
    for i, kind in enumerate(tokenizers):
        tokenizer = clip_tokenizer(TOKENS) if kind == "c" else t5_tokenizer()
        columns["tokens" if i == 0 else f"tokens_{i + 1}"] = tokenizer(
            rows["caption"],
            padding="max_length",
            max_length=TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
    tokenised = {key: value for key, value in rows.items() if key != "caption"} | columns
    found = task_of(name).encode(tokenised).condition
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert task.pipeline.tokenizer(["a"]).input_ids  # their own tokenizer is back

    embedded = [task.embed([caption]) for caption in rows["caption"]]
    names = task.embeddings
    ready = {ours: torch.cat([row[i] for row in embedded]) for i, ours in enumerate(names)}
    ready |= {"latents": task.encode(rows).latents, "sample_id": rows["sample_id"]}
    parts = {part: value for part, value in build(name).components.items() if value is not None}
    for part in list(parts):
        if part.startswith(("vae", "text_encoder", "tokenizer")):
            del parts[part]
    options = {"resolution": 2 * SIZE} if name == "flux" else {}
    kind = "PixArtAlphaPipeline" if name == "pixart" else None
    said = DiffusersTask(
        batch={"latents": "latents", "prompt_embeds": "prompt_embeds"},
        pipeline=kind,
        options=options,
    )
    alone = said.bind(parts)
    found = alone.encode(ready).condition
    for key in expected.keys() - {"time_ids"}:
        torch.testing.assert_close(found[key], expected[key])
    assert torch.equal(alone.encode(ready).latents, task.encode(rows).latents)
    assert alone.decode(ready["latents"]) is None
    assert task.decode(ready["latents"]) is not None
    with pytest.raises(TaskError, match="prompt cannot be encoded without.*text_encoder.*HINT"):
        alone.condition("a cat by x", 1)
    with pytest.raises(TaskError, match="encoded without a VAE.*HINT"):
        alone.encode(rows)


def test_a_batch_may_be_a_tuple() -> None:
    task = DiffusersTask(batch={"0": "image", "1": "class", "2": "sample_id"}).bind(
        build("ddpm-classes").components
    )
    rows = batch(2)
    encoded = encode(task, (rows["image"], rows["class"], rows["sample_id"]))
    assert encoded.sample_ids == rows["sample_id"]
    assert encoded.condition["class_labels"].tolist() == [0, 1]
    with pytest.raises(BatchError, match=r"asked for '1'.*the batch has \['0', 'sample_id'\]"):
        encode(task, {"0": rows["image"], "sample_id": rows["sample_id"]})

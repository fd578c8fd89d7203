"""Several answers together."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ctrak_lightning import Attributions, Attributor, Concept
from ctrak_lightning.attribution import Attribution, CoincidingConceptsWarning, attributions
from ctrak_lightning.attribution.attributions import cosines_of, warn_of_alike
from ctrak_lightning.methods.objectives import SquaredNorm, Term
from ctrak_lightning.store import SampleTable

from .test_attributor import BAR, METHODS, RED, SAMPLER, traced

IDS = ["a", "b", "c", "d", "e"]
SCORES = {
    "x": [5.0, 4.0, 3.0, 2.0, 1.0],
    "y": [4.0, 1.0, 5.0, 2.0, 3.0],
    "z": [1.0, 2.0, 3.0, 4.0, 5.0],
}
# Top 2: x has a, b; y has c, a; z has e, d. Top 3: x has a, b, c; y has c, a, e; z has e, d, c.


def answers(names: tuple[str, ...] = ("x", "y", "z")) -> Attributions:
    samples = SampleTable(IDS, ["0" * 64] * 5, {"owner": ["p", "q", "p", "q", "p"]})
    results = [
        Attribution(
            concept=Concept(name, f"an {name} in a picture", "a picture"),
            seed=0,
            checkpoint_scores=torch.tensor([SCORES[key]]),
            steps=[1],
            samples=samples,
            method={"name": "m"},
            strength=1.0,
        )
        for name, key in zip(names, SCORES, strict=False)
    ]
    return Attributions(results, torch.eye(len(results)) * 0.5 + 0.5)


def test_what_is_shared_and_what_is_not() -> None:
    found = answers()
    assert isinstance(found, list)
    assert [(one.sample_id, one.concepts) for one in found.shared(2)] == [("a", ["x", "y"])]
    [one] = found.shared(2)
    assert one.ranks == {"x": 1, "y": 2, "z": 5}
    assert one.scores == {
        name: float(result.scores[0]) for name, result in zip("xyz", found, strict=True)
    }
    assert one.metadata == {"owner": "p"}
    assert [(one.sample_id, one.concepts) for one in found.shared(3)] == [
        ("c", ["x", "y", "z"]),
        ("a", ["x", "y"]),
        ("e", ["y", "z"]),
    ]
    assert [one.sample_id for one in found.shared(3, least=3)] == ["c"]
    assert [(one.sample_id, one.concepts) for one in found.exclusive(2)] == [
        ("b", ["x"]),
        ("c", ["y"]),
        ("e", ["z"]),
        ("d", ["z"]),
    ]
    assert len(found.shared(100)) == 5
    assert found.exclusive(100) == []
    for wrong in (
        lambda: found.shared(0),
        lambda: found.exclusive(0),
        lambda: found.shared(2, least=1),
    ):
        with pytest.raises(ValueError, match="expected at least"):
            wrong()


def test_the_tables(tmp_path: Path) -> None:
    found = answers(("x", "y", "x"))  # a name twice
    assert found.names == ["x (1)", "y", "x (3)"]
    found.to_csv(tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sample_id"] for row in rows] == IDS
    assert [row["rank y"] for row in rows] == ["2", "5", "1", "4", "3"]
    assert [row["rank x (3)"] for row in rows] == ["5", "4", "3", "2", "1"]
    assert float(rows[1]["score y"]) == float(found[1].scores[1])
    assert rows[1]["owner"] == "q"
    found.to_json(tmp_path / "t.json", n=2)
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["concepts"][1] == {
        "called": "y",
        "confidence": found[1].confidence.to_dict(),
        "name": "y",
        "present": "an y in a picture",
        "absent": "a picture",
        "seed": 0,
    }
    assert document["cosines"][0] == [1.0, 0.5, 0.5]
    assert [one["sample_id"] for one in document["shared"]] == ["a"]
    assert [one["sample_id"] for one in document["exclusive"]] == ["b", "c", "e", "d"]
    lines = found.table(2).splitlines()
    assert lines[1] == 'y: "an y in a picture" without it: "a picture"'
    assert "cosine of 'y' and 'x (3)': 0.50" in lines
    assert "in the top 2: 1 shared, 4 of one concept only" in lines
    assert lines[-5].split() == ["1", "2", "5-", "a"]
    assert str(found) == found.table(10)


def test_cosines_are_means_over_checkpoints() -> None:
    features = torch.tensor(
        [[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, 5.0], [0.0, -1.0]]]
    )
    expected = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, -0.5], [0.0, -0.5, 1.0]])
    torch.testing.assert_close(cosines_of(features), expected)


def test_concepts_that_nearly_coincide_are_named() -> None:
    one, other, third = (
        Concept(name, "p", absent) for name, absent in (("u", "q"), ("v", "r"), ("w", "s"))
    )
    cosines = torch.tensor([[1.0, 0.95, 0.1], [0.95, 1.0, 0.89], [0.1, 0.89, 1.0]])
    with pytest.warns(CoincidingConceptsWarning, match=r": 'u' and 'v' \(0.95\)\. .*HINT"):
        warn_of_alike([one, other, third], [0, 0, 0], cosines)
    # Of other images, or asked twice, they may well coincide.
    warn_of_alike([one, other, third], [0, 1, 0], cosines)
    warn_of_alike([one, one, third], [0, 0, 0], cosines)
    warn_of_alike([one, Concept("v", "another", "r"), third], [0, 0, 0], cosines)
    picture = torch.zeros(3, 2, 2)
    given = [Concept(name, "p", absent, image=picture) for name, absent in (("u", "q"), ("v", "r"))]
    with pytest.warns(CoincidingConceptsWarning):
        warn_of_alike(given, [0, 0], cosines[:2, :2])
    anywhere = [Concept(name, "p", "q", alone=name, image=None) for name in "uv"]
    with pytest.warns(CoincidingConceptsWarning):
        warn_of_alike(anywhere, [0, 0], cosines[:2, :2])


def test_an_attributor_gives_the_cosines_and_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = traced(tmp_path / "s", METHODS["per_sample"])
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    query = attributor.query([RED, BAR], 3)
    found = attributor.attribute_many([RED, BAR], 3)
    rows = query.features.double()
    expected = torch.stack([(r[0] @ r[1]) / r[0].norm() / r[1].norm() for r in rows]).mean()
    assert float(found.cosines[0, 1]) == pytest.approx(float(expected), abs=1e-5)
    assert abs(float(expected)) < 0.9
    monkeypatch.setattr(attributions, "ALIKE", float(found.cosines[0, 1]) - 1e-3)
    with pytest.warns(CoincidingConceptsWarning, match="'red' and 'bar'"):
        attributor.attribute_many([RED, BAR], 3)
    # A whole-image method asks the same of both, and that is no news.
    whole = replace(METHODS["per_sample"], query=(Term(SquaredNorm()),))
    same = Attributor(tmp_path / "s", module, sampler=SAMPLER, method=whole).attribute_many(
        [RED, BAR], 3
    )
    assert float(same.cosines[0, 1]) == pytest.approx(1.0)

"""``ctrak recipe``: what is listed and copied, that a copy needs nothing else, and that nothing of
the user's is written over."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ctrak_lightning.cli import main, recipe
from ctrak_lightning.errors import RecipeError

ROOT = Path(__file__).parents[2]
NAMES = [
    *("class_conditional", "ddpm_unconditional", "emoji_artists", "emoji_text"),
    *("flow_matching_lora", "text_to_image_lora"),
]


def test_the_list_has_every_recipe_with_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.names() == NAMES
    main(["recipe", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert "sd15.yaml, sd21.yaml, sdxl.yaml  LoRA on Stable Diffusion 1.x, 2.x or XL." in lines[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_all_that_it_imports_and_the_callbacks(name: str, tmp_path: Path) -> None:
    files = recipe.copy(name, tmp_path)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(files) == written
    assert {f"callbacks/{path.name}" for path in (ROOT / "callbacks").iterdir()} < written
    assert not [each for each in written if "benchmarks" in each or "results" in each]
    for path in tmp_path.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1]
                parts = node.module.split(".") if node.module else [node.names[0].name]
                module = base.joinpath(*parts)
                assert module.with_suffix(".py").is_file() or (module / "__init__.py").is_file()


def test_a_copy_is_run_from_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipe", "copy", "text_to_image_lora", str(tmp_path / "mine")])
    told = capsys.readouterr().out.splitlines()
    assert "pip install 'ctrak-lightning[lora,pipelines]'" in told
    assert f"cd {tmp_path / 'mine'}" in told
    [command] = [line for line in told if "sd15" in line]
    code = (
        "import sys; from ctrak_lightning.cli import main\n"
        f"try: main({[*command.split()[1:], '--print_config']})\n"
        "finally: print(sys.modules['recipes.images'].__file__)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "mine",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "class_path: ctrak_lightning.callbacks.ConceptTracer" in printed
    assert printed.splitlines()[-1] == str(tmp_path / "mine" / "recipes" / "images.py")


def test_nothing_that_was_changed_is_written_over(tmp_path: Path) -> None:
    recipe.copy("ddpm_unconditional", tmp_path)
    shared, own = tmp_path / "recipes" / "images.py", tmp_path / "callbacks" / "concept_tracer.yaml"
    recipe.copy("class_conditional", tmp_path)  # what they share is the same
    own.write_text("# mine\n")
    before = shared.stat().st_mtime_ns
    with pytest.raises(RecipeError, match=r"has callbacks/concept_tracer.yaml of .*HINT.*--force"):
        recipe.copy("text_to_image_lora", tmp_path)
    assert own.read_text() == "# mine\n"
    assert not (tmp_path / "recipes" / "text_to_image_lora").exists()
    recipe.copy("text_to_image_lora", tmp_path, force=True)
    assert own.read_bytes() == (ROOT / "callbacks" / "concept_tracer.yaml").read_bytes()
    assert shared.stat().st_mtime_ns == before


def test_what_cannot_be_copied_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="no recipe 'text_to_image'. Nearest: text_to_image_lora"):
        recipe.copy("text_to_image", tmp_path)
    with pytest.raises(SystemExit, match="expected a name and a folder. HINT.*copy x FOLDER"):
        main(["recipe", "copy", "x"])
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="file cannot be written.*HINT: name another folder"):
        recipe.copy("ddpm_unconditional", tmp_path / "file")
    with monkeypatch.context() as patched:
        patched.setattr(recipe, "_HOMES", (tmp_path,))
        with pytest.raises(RecipeError, match="the recipes are not here.*HINT"):
            recipe.names()


def test_the_demo_asks_no_foreign_package_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").write_text("raise RuntimeError('foreign')")
    code = (
        "import sys; from ctrak_lightning.cli import main\n"
        "try: main(['demo', '--help'])\n"
        "finally: print('recipes' in sys.modules, sys.path.count(''))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ctrak demo")
    assert done.stdout.endswith("False 1\n")

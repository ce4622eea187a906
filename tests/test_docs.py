"""What documents and shelves promise: files are read as text or by ast, commands run apart."""

import ast
import contextlib
import functools
import graphlib
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = set("train prepare bidora hypergrad bilevel model data tasks config sample".split())
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "support/README.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
README, CONTRIBUTING, SUPPORT = [*TEXTS.values()][:3]
ROOMS = ("support", "tools", "research")


def name_of(path):
    return str(path.relative_to(ROOT))


def without_code(text):
    """A document without its fenced and indented blocks."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"(?m)^    .*$", "", text)


def test_the_documents_are_short_enough_to_be_read_to_their_ends():
    limits = {"README": 1200, "docs/using": 3500, "docs/results": 2800, "docs/variations": 800}
    limits["docs/claims"] = 1400
    words = {name: len(TEXTS[ROOT / f"{name}.md"].split()) for name in limits}
    assert {name: n for name, n in words.items() if n > limits[name]} == {}


def anchors(path):
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", without_code(TEXTS[path]))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_relative_link_and_picture_exists(path):
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", without_code(TEXTS[path])):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_picture_is_small_and_shown_by_a_document():
    pictures = sorted((ROOT / "docs").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 80_000, picture.name
        assert any(f"{picture.name})" in text for text in TEXTS.values()), picture.name


def test_every_python_block_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert ["bilevel_step" in block for block in blocks].count(True) == 1
    for block in blocks:
        exec(block, {})
        assert capsys.readouterr().out.count("train ") == 10 or "bilevel_step" not in block


OWN = """
import data as own_data, model as own_model, support as own_support
assert own_data.OWN and own_model.OWN and own_support.OWN
from peft import PeftModel
from bidora import BiDoRATrainer, save_adapter
save_adapter(model, "out")
base = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
base.load_state_dict(model.state_dict(), strict=False)
x = torch.randn(5, 16)
torch.testing.assert_close(PeftModel.from_pretrained(base, "out")(x), model(x))
"""


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_installed_beside_a_user_s_own_files_the_readme_s_example_runs_and_saves(hook, tmp_path):
    """From the wheel that pip's hook builds; PEFT reads what was saved."""
    (tmp_path / "support").mkdir()
    for name in ("data.py", "model.py", "support/__init__.py"):
        (tmp_path / name).write_text("OWN = True")
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.py").write_text(example + OWN)

    build = f"import shutil, wheels; shutil.unpack_archive(wheels.{hook}('.'), 'site', 'zip')"
    for path, *command in ((ROOT / ".ci", "-c", build), (tmp_path / "site", "mine.py")):
        environment = os.environ | {"PYTHONPATH": str(path)}
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True)


def test_the_readme_gives_the_test_command_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    [command] = re.findall(r"(?m)^python -m pytest.*$", script)
    assert f"    {command}\n" in README and f"    {command}" in CONTRIBUTING


def test_support_s_table_lists_exactly_its_files():
    listed = re.findall(r"(?m)^\| `(\w+/\w+\.py)` \| (\S.*) \|$", SUPPORT)
    files = [name_of(path).removeprefix("support/") for path in ROOT.glob("support/*/*.py")]
    assert sorted(name for name, _ in listed) == sorted(files)
    for name, sentence in listed:
        assert sentence.endswith(".") and sentence.count(". ") == 0, name


def tools_named(text):
    return set(re.findall(r"\b((?:tools|research)\.\w+)", text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_tool_that_a_document_names_exists(path):
    for name in tools_named(TEXTS[path]):
        source = ROOT / f"{name.replace('.', '/')}.py"
        assert source.exists(), name
        assert '__name__ == "__main__"' in source.read_text(encoding="utf-8"), name


@functools.cache
def options(name):
    """The --names that the help of a program shows: train, sample, tools.NAME or research.NAME."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        importlib.import_module(name).main(["--help"])
    names = set(re.findall(r"(?m)^ +--(\w+)", shown.getvalue()))
    assert names, name
    return names | {"config"}


PROGRAM = re.compile(r"\b(train)\.py|\b(sample)\.py|\b((?:tools|research)\.\w+)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_setting_that_a_document_shows_exists(path):
    for section in re.split(r"(?m)^#+ ", TEXTS[path]):
        known = options("train").union(*map(options, tools_named(section)))
        if "sample.py" in section:
            known |= options("sample")
        for code in re.findall(r"(?m)^    .*$|`[^`\n]+`", section):
            if "pytest" in code or code == "`--name=value`":
                continue
            program, allowed = PROGRAM.search(code), known
            if program:
                allowed = options(next(filter(None, program.groups())))
                code = code[program.end() :]  # torchrun's own settings come before train.py
            names = set(re.findall(r"--(\w+)=", code))
            assert names <= allowed, f"{code.strip()}: {names - allowed}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_method_and_hypergradient_that_a_document_sets_exists(path):
    import bilevel
    from research.relatives import bidora  # with these methods, too

    assert set(re.findall(r"--method=(\w+)", TEXTS[path])) <= {*bidora.METHODS, "ft", "M"}
    assert set(re.findall(r"--hypergradient=(\w+)", TEXTS[path])) <= set(bilevel.HYPERGRADIENTS)


def code(*folders):
    """The Python files in folders and, but for the top level ("."), in the folders below them."""
    below = {folder: "*.py" if folder == "." else "**/*.py" for folder in folders}
    return sorted(path for folder in folders for path in (ROOT / folder).glob(below[folder]))


def shelf(module):
    """0 for support, 1 for the top level, 2 for tools and research."""
    return {"support": 0, "tools": 2, "research": 2}.get(module.partition(".")[0], 1)


def modules():
    """{name: path} of the three shelves' modules, but for bidora_package, found when asked for."""
    paths = {name_of(path.with_suffix("")).replace("/", "."): path for path in code(".", *ROOMS)}
    del paths["support.weights.bidora_package"]
    return paths


def imports(path, known):
    """The modules among `known` that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(known)


def test_the_top_level_holds_the_lesson_s_files_alone():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP


def test_nothing_imports_upward_and_there_is_no_circle():
    known = modules()
    graph = {name: imports(path, known) for name, path in known.items()}
    for name, imported in graph.items():
        upward = {other for other in imported if shelf(other) > shelf(name)}
        assert not upward, f"{name} imports {upward}"
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def functions(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines(paths):
    return {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}


def test_the_house_stays_small():
    """Lines are what a reader pays. The limits are today's sizes, so that they fall."""
    shelf, rooms = lines(code(".")), lines(code(*ROOMS, "configs"))
    assert sum(shelf.values()) <= 2929
    assert sum(shelf.values()) + sum(rooms.values()) <= 14986
    assert sum(lines(code("tests")).values()) <= 14201
    assert {name_of(path): n for path, n in (shelf | rooms).items() if n > 480} == {}


@pytest.mark.parametrize("folder", [".", *ROOMS])
def test_no_function_is_longer_than_50_lines(folder):
    for path in code(folder):
        long = [f.name for f in functions(path) if f.end_lineno - f.lineno + 1 > 50]
        assert long == [], path.name


@pytest.mark.parametrize("name", sorted(TOP))
def test_no_function_of_the_lesson_takes_more_than_8_positional_parameters(name):
    for function in functions(ROOT / f"{name}.py"):
        names = {a.arg for a in function.args.posonlyargs + function.args.args}
        assert len(names - {"self", "cls", "ctx"}) <= 8, function.name


def test_no_line_of_code_is_wider_than_100_columns():
    for path in code(".", *ROOMS, "tests", "configs"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == [], name_of(path)


def test_no_test_reads_a_wall_clock():
    clock = re.compile(r"time\.(time|monotonic|perf_counter)(_ns)?\(")
    assert [p for p in code("tests") if clock.search(p.read_text(encoding="utf-8"))] == []


RECIPES = dict(re.findall(r"<!-- recipe: (.+?) -->\n```python\n(.*?)```", CONTRIBUTING, re.DOTALL))


def insert(path, recipe, line, before=False):
    """Put a recipe's code after the one line of a file that begins so, or before it."""
    code = RECIPES[recipe]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    [index] = [i for i, there in enumerate(lines) if there.startswith(line)]
    lines.insert(index + (not before), code + "\n\n" * (before and "def " in code))
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def copy(tmp_path):
    """The project in a folder of its own, and a function that runs train.py of it."""
    folder = tmp_path / "copy"
    for name in (*ROOMS, "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    environment = os.environ | {"PYTHONPATH": ""}
    options = dict(cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return folder, run


QUICK = ("train.py", "--config=tiny.py", "--search_steps=4", "--retrain_steps=4")


def test_the_recipe_for_a_method_gives_one_that_trains_and_loads(copy):
    folder, run = copy
    insert(folder / "bidora.py", "method", "METHODS = {")
    run(*QUICK, "--method=rslora", "--out_dir=out/new")
    assert "%" in run("sample.py", "--adapter=out/new", "--prompt=aeae lim")


def test_the_recipe_for_a_hypergradient_gives_one_that_trains(copy):
    folder, run = copy
    insert(folder / "hypergrad.py", "hypergradient function", "def neumann(", before=True)
    insert(folder / "bilevel.py", "hypergradient", "HYPERGRADIENTS = {")
    assert "t1t2" in run(*QUICK, "--hypergradient=t1t2", "--hypergradient_lr=0.1")
    run(*QUICK, "--hypergradient=t1t2", "--precondition=none", "--out_dir=out/default")


def test_the_recipe_for_a_data_set_gives_one_that_trains_and_says_what_to_try(copy):
    folder, run = copy
    insert(folder / "support/text/datasets.py", "data set function", "BUILT_IN = {", before=True)
    insert(folder / "support/text/datasets.py", "data set", "BUILT_IN = {")
    shown = run(*QUICK, "--data=parity")
    assert "even" in shown and '--prompt="1234"' in shown


def test_the_recipe_for_a_schedule_falls_as_a_cosine(copy):
    folder, run = copy
    path = folder / "train.py"
    insert(path, "schedule import", "import os", before=True)
    text = path.read_text(encoding="utf-8")
    old = re.search(r"(?m)^    return 1 - .*\n", text[text.index("def learning_rate_scale(") :])[0]
    path.write_text(text.replace(old, RECIPES["schedule"]), encoding="utf-8")
    values = "*(train.learning_rate_scale(step, 100) for step in (5, 10, 55, 100))"
    values = list(map(float, run("-c", f"import train; print({values})").split()))
    assert values == pytest.approx([0.5, 1, 0.55, 0.1])
    run(*QUICK)

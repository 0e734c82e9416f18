"""Checks sheets in a real browser, the answers that come back, agreement, and blind rating."""
import json
import re
import shutil
import time

import numpy as np
import pytest

from model import UserError
from people import agreement
from people import sheet as people
from tests.test_pipeline import rows, run

NASTY = ["</script><script>document.title='hacked'</script>",
         "<b>bold</b> &amp; \"quotes\" 'single'", "\U0001f600 emoji",
         "bell \x07 and \x1b[31m escape", "<!-- comment", "line\nbreak", "\u2028 separator",
         "{} DATA POLICY"]


def sheet_of(tmp_path, texts):
    items = [{"id": f"item-{i}", "source": "model", "text": text, "tokens": [i]}
             for i, text in enumerate(texts)]
    people.write_sheet(tmp_path / "sheet.html", "labels", items)
    return tmp_path / "sheet.html", items


def test_a_sheet_says_what_was_put_into_it(tmp_path):
    path, items = sheet_of(tmp_path, NASTY)
    assert people.read_sheet(path)["items"] == items
    page = path.read_text()
    assert page.count("<script") == 2 and "unsafe" not in page and "://" not in page  # both ours
    sheet_of(tmp_path, NASTY)  # the same items again are fine
    with pytest.raises(UserError, match="other items"):
        sheet_of(tmp_path, NASTY[1:])
    (tmp_path / "other.html").write_text("<p>hello</p>")
    with pytest.raises(UserError, match="not a sheet"):
        people.read_sheet(tmp_path / "other.html")


def test_what_came_back_is_checked_line_by_line(tmp_path, capsys):
    path, items = sheet_of(tmp_path, ["one", "two", "three"])

    def row(i, **change):
        return json.dumps(items[i] | {"label": "positive", "labeller": "anna", "time": 1,
                                      "seconds": 2.0} | change) + "\n"
    (tmp_path / "a.jsonl").write_text(
        row(0) + row(1, text="tWo") + row(2, label="glorious") + row(0, id="item-9") + "{broken\n"
        + row(1, labeller="../x") + row(2, label="skip"))
    (tmp_path / "b.jsonl").write_text(row(1) + row(1, labeller="bo", label="negative"))
    given, wrong = people.returned(people.read_sheet(path),
                                   (tmp_path / "a.jsonl", tmp_path / "b.jsonl"))
    assert {name: {k: r["label"] for k, r in rows.items()} for name, rows in given.items()} == {
        "anna": {"item-0": "positive", "item-2": "skip", "item-1": "positive"},
        "bo": {"item-1": "negative"}}
    told = capsys.readouterr().err.splitlines()
    assert wrong == len(told) == 5
    for line, why in zip(told, ("a.jsonl line 2 .*altered", "a.jsonl line 3 .*glorious",
                                "line 4 .*not an item", "line 5 .*broken",
                                "line 6 .*not a name")):
        assert re.search(why, line), (why, line)


def test_agreement_equals_a_worked_example(capsys):
    """Krippendorff 2011, "Computing Krippendorff's alpha-reliability", example C (nominal data,
    four observers, missing values) has alpha = 0.743. Kappa of two raters is checked by hand."""
    observers = {"A": "1 2 3 3 2 1 4 1 2 . . .", "B": "1 2 3 3 2 2 4 1 2 5 . 3",
                 "C": ". 3 3 3 2 3 4 2 2 5 1 .", "D": "1 2 3 3 2 4 4 1 2 5 1 ."}
    observers = {name: {str(i): x for i, x in enumerate(line.split()) if x != "."}
                 for name, line in observers.items()}
    found = agreement.agreement(observers)
    assert abs(found["alpha"] - 0.743) < 5e-4
    assert found["disputed"] == ["1", "5", "7"]
    a, b = {"x": "p", "y": "p", "z": "n", "w": "n"}, {"x": "p", "y": "n", "z": "n", "w": "n"}
    (kappa, n), = agreement.kappas({"a": a, "b": b}).values()
    assert n == 4 and abs(kappa - 0.5) < 1e-12  # observed 0.75, expected 0.5
    same = agreement.agreement({"a": a, "b": a})
    assert same["alpha"] == 1 and same["disputed"] == []
    agreement.print_agreement({"a": a, "b": b | {"x": "skip"}}, [])      # kappa, too, ignores skips
    assert "a and b: Cohen's kappa 0.00 on 3 common items" in capsys.readouterr().out
    assert np.isnan(agreement.agreement({"a": {"x": "p"}, "b": {"x": "p"}})["alpha"])  # no variance


# ---- A real browser ------------------------------------------------------------------------------
def press(page, keys):
    for key in keys:
        page.switch_to.active_element.send_keys(key)


def text(page, element):
    return page.find_element("id", element).text


def save(page, tmp_path, name):
    from selenium.webdriver.common.by import By
    field = page.find_element(By.ID, "name")
    field.clear()
    field.send_keys(name)
    page.find_element(By.ID, "save").click()
    files, deadline = tmp_path / "downloads", time.time() + 20
    while not (done := [path for path in files.glob(f"*-{name}.jsonl") if path.stat().st_size]):
        assert time.time() < deadline, text(page, "warning")  # a download starts as an empty file
        time.sleep(0.1)
    return done[0]


def test_thirty_items_by_keyboard_in_a_browser_and_03_trains_on_them(pipeline, tmp_path, browser):
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    sheet = tmp_path / "for anna.html"
    done = run("people sheet", out, str(sheet), "--n", "40")
    assert done.returncode == 0 and "40 items" in done.stdout, done.stderr
    items = people.read_sheet(sheet)["items"]
    done = run("people sheet", out, str(tmp_path / "second.html"), "--n", "40", "--skip", "40")
    others = people.read_sheet(tmp_path / "second.html")["items"]
    assert (len(items) == len(others) == 40
            and not {i["id"] for i in items} & {i["id"] for i in others})

    page = browser(sheet)
    press(page, "pn0" * 10)
    assert ("30 answered" in text(page, "count")
            and "positive 10, negative 10, neutral 10, skip 0" in text(page, "count"))
    page = browser(sheet)                                  # closed and reopened
    assert "Item 31 of 40. 30 answered" in text(page, "count")
    press(page, "u")                                       # undo the last one, a neutral
    assert "Item 30 of 40. 29 answered" in text(page, "count")
    press(page, "s")
    page.find_element("id", "save").click()
    assert "First enter your name" in text(page, "warning")
    answers = rows(save(page, tmp_path, "anna"))
    assert [r["id"] for r in answers] == [i["id"] for i in items[:30]]
    assert [r["label"] for r in answers] == ["positive", "negative", "neutral"] * 9 + [
        "positive", "negative", "skip"]
    assert all(r["labeller"] == "anna" and r["text"] == i["text"] and 0 <= r["seconds"] < 60
               for r, i in zip(answers, items))
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]

    back = tmp_path / "downloads" / "labels-anna.jsonl"
    for new in (30, 0):                                    # merging twice adds nothing
        done = run("people merge", out, str(sheet), str(back))
        assert done.returncode == 0 and f"30 answers, {new} of them new" in done.stdout, done.stderr
        assert "anna and vader: Cohen's kappa" in done.stdout
    done = run("03_reward_model.py", out)
    assert done.returncode == 0 and "anna: 29 labels" in done.stdout, done.stderr
    back.write_text(back.read_text().replace('"positive"', '"glorious"', 1))
    done = run("people merge", out, str(sheet), str(back))
    assert (done.returncode == 2 and "line 1 left out" in done.stderr
            and "1 lines were left out" in done.stderr)


def test_two_tabs_share_their_answers_and_the_next_person_starts_anew(tmp_path, browser):
    """Two answers, four in a second tab, an undo there, one more in the first: six are kept."""
    path, items = sheet_of(tmp_path, [f"text {i}" for i in range(12)])
    page = browser(path)
    press(page, "pp")
    first = page.current_window_handle
    page.switch_to.new_window("tab")
    page.get(path.as_uri())
    assert "2 answers are saved in this browser. Someone else?" in text(page, "warning")
    press(page, "nnnnu")
    page.switch_to.window(first)
    press(page, "p")
    assert "6 answered" in text(page, "count")
    answers = {row["id"]: row["label"] for row in rows(save(page, tmp_path, "anna"))}
    assert sorted(answers.values()) == ["negative"] * 3 + ["positive"] * 3
    page.find_element("css selector", "button[value=anew]").click()
    assert "Item 1 of 12. 0 answered" in text(page, "count")
    assert page.find_element("id", "name").get_property("value") == ""
    page.switch_to.window(page.window_handles[-1])  # the other tab must not bring them back
    press(page, "0")
    assert "1 answered" in text(page, "count")
    page = browser(path)
    assert "1 answered" in text(page, "count") and "neutral 1" in text(page, "count")


def test_samples_stay_text_on_a_phone_in_the_dark(tmp_path, browser):
    path, items = sheet_of(tmp_path, NASTY)
    page = browser(path, "360,640")
    for _, item in enumerate(items):
        shown = page.execute_script("return document.querySelector('#texts p').textContent")
        assert shown == "".join("\ufffd" if ord(c) < 32 and c != "\n" or 127 <= ord(c) < 160 else c
                                for c in item["text"])
        assert page.execute_script("return document.querySelector('#texts p').children.length") == 0
        page.execute_script("document.querySelector('#answers button').click()")  # a touch
    assert page.title.startswith("Shakespeare") and "All are answered" in text(page, "count")
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    press(page, [chr(0xE012)])                             # arrow left
    assert f"Item {len(items) - 1} of" in text(page, "count")
    assert {r["text"] for r in rows(save(page, tmp_path, "bo"))} == set(NASTY)
    # an injected script would not run, and nothing may be loaded
    page.execute_script("const s = document.createElement('script'); s.textContent = "
                        "'window.ran = 1'; document.body.append(s)")
    assert page.execute_script("return window.ran") is None


def test_pairs_are_compared(pipeline, tmp_path, browser):
    sheet, out = tmp_path / "pairs.html", tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    assert run("02_sample_label.py", out, "--compare").returncode == 0
    done = run("people sheet", out, str(sheet), "--n", "4", "--compare")
    assert done.returncode == 0, done.stderr
    page = browser(sheet)
    assert len(page.find_elements("css selector", "#texts p")) == 2
    press(page, "ltrs")
    answers = rows(save(page, tmp_path, "anna"))
    assert [r["label"] for r in answers] == ["left", "tie", "right", "skip"]
    by_id = {r["id"]: r for r in rows(pipeline[0] / "samples.jsonl")}
    assert all([by_id[i]["text"] for i in r["id"].split()] == r["text"] and len(r["tokens"]) == 2
               for r in answers)


# ---- Blind rating --------------------------------------------------------------------------------
def test_ratings_by_mail_stay_blind_until_they_are_back(pipeline, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    sheet = str(tmp_path / "rate.html")
    done = run("people rate", out, sheet, "--n", "5")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "rate.html").read_text()
    key = json.loads(next(out.glob("key-*.json")).read_text())
    assert sorted(key["arms"].values()) == ["base"] * 5 + ["happy"] * 5
    assert not [word for word in ("policy", "arms", "happy") if word in page.split('id="data"')[0]]
    items = people.read_sheet(tmp_path / "rate.html")["items"]
    assert all(set(item) == {"id", "text"} for item in items)

    def rate(name, judge, n=10):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(i | {
            "label": judge(key["arms"][i["id"]]), "labeller": name, "time": 0, "seconds": 1}) + "\n"
            for i in items[:n]))
        return str(tmp_path / f"{name}.jsonl")
    fair = rate("anna", lambda arm: "positive" if arm == "happy" else "negative")
    done = run("people merge", out, sheet, fair, rate("bo", lambda arm: "neutral"),
               rate("cy", lambda arm: "positive" if arm == "happy" else "neutral"),
               rate("di", lambda arm: "neutral", 9))
    assert done.returncode == 0, done.stderr
    assert "anna: positive 0 of 5 base, 5 of 5 happy samples (" in done.stdout
    assert ("majority: positive 0 of 5 base, 5 of 5" in done.stdout
            and "Krippendorff's alpha" in done.stdout)
    assert "9 of 10 rated; the key stays hidden" in done.stdout
    results = json.loads((out / "ratings.json").read_text())
    assert [r["rater"] for r in results["results"]] == ["anna", "bo", "cy", "majority"]
    (tmp_path / "anna.jsonl").write_text("{}\n")
    done = run("people merge", out, sheet, fair)
    assert done.returncode == 2 and "line 1 left out: broken" in done.stderr
    # a key of other policies is refused
    (out / "ratings.json").unlink()
    path = next(out.glob("key-*.json"))
    path.write_text(json.dumps(key | {"policies": key["policies"] | {
        "sad": {"name": "policy-sad", "fingerprint": "of an earlier run"}}}))
    done = run("people unblind", out)
    assert (done.returncode == 2 and "belongs to other policies" in done.stderr
            and not (out / "ratings.json").exists())
    # any checkpoint of this run can be rated, and none of another
    chosen = next((out / "checkpoints").iterdir())
    sheet = str(tmp_path / "chosen.html")
    done = run("people rate", out, sheet, "--n", "2", "--policy", str(chosen))
    keys = [json.loads(path.read_text()) for path in out.glob("key-*.json")]
    assert done.returncode == 0 and chosen.stem in [
        key["policies"]["happy"]["name"] for key in keys if len(key["arms"]) == 4]
    shutil.copy(chosen, tmp_path / "elsewhere.safetensors")
    done = run("people rate", out, str(tmp_path / "other.html"), "--n", "2", "--policy",
               str(tmp_path / "elsewhere.safetensors"))
    assert done.returncode == 2 and "is not in the folder of this run: copy it into" in done.stderr

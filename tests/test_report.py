"""Checks the report: token colours, health marks and escaping; then the page in a real browser."""
import copy
import importlib
import json
import re
import shutil
from xml.etree import ElementTree

import pytest
import torch

import report
from model import GPT, GPTConfig
from report import health, plots, svg, table, trust

ev = importlib.import_module("05_eval")
NASTY = ("</script><script>document.title='hacked'</script><img src=x onerror=alert(1)> & \"q\" "
         "POLICY {{ 1 }}")


def test_the_colours_of_tokens_are_what_the_reward_model_says_of_prefixes():
    """Prompts have several lengths, so prefixes start at several places. The changes add up."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=35, context=16, n_layer=2, n_head=2, n_kv_head=1, d_model=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    y = torch.randint(32, (3, 7))
    prompt = torch.tensor([[1, 2, 3], [4, -1, -1], [5, 6, -1]])
    found = ev.log_odds(model, y, prompt)
    assert found.shape == (3, 8)
    for t in range(1, 8):
        log_p = model.sentiment(y[:, :t], prompt)
        torch.testing.assert_close(found[:, t], log_p[:, 0] - log_p[:, 1], atol=1e-5, rtol=0)
    row = {"pieces": [["a", "b", "c", "d", "e", "f", "g"]] * 3, "log_odds": found.tolist(),
           "prompts": [""] * 3, "each": {"p_happy": [0.9, 0.2, 0.9], "vader": [-0.5, 0.5, 0]}}
    for sample, x in zip(trust.shown_samples(row), found.tolist()):
        assert sum(change for _, change, _ in sample["tokens"]) == pytest.approx(x[-1] - x[0])
    assert [sample["disagree"] for sample in trust.shown_samples(row)] == [True, True, False]
    assert [trust.shade(x) for x in (-2, -1, -0.49, 0, 0.5, 1.99, 2)] == [
        "down4", "down2", "", "", "up1", "up3", "up4"]


def test_pieces_join_to_the_text_though_a_character_has_several_tokens(pipeline):
    tokenizer = ev.load(pipeline[0] / "base.safetensors", "")[1]
    text = "king \u2019tis caf\u00e9 \U0001f600!\n"
    ids = tokenizer.encode(text).ids
    pieces = ev.pieces(tokenizer, ids)
    assert ("".join(pieces) == text == tokenizer.decode(ids) and len(pieces) == len(ids)
            and "" in pieces)
    assert "".join(ev.pieces(tokenizer, ids[:-3])) == tokenizer.decode(ids[:-3])  # half a character


LOG = [{"updates": 8 * k, "kl": (0.25 * k)**2, "kl_k1": (0.25 * k)**2, "kl_se": 0.1,
        "kl_k1_se": 0.1, "entropy": 3.5 - 0.05 * k, "clip_fraction": 0.03, "lr": 1e-4,
        "adv_mean": 0.1 * k, "adv_std": 1 - 0.05 * k} for k in range(12)]


@pytest.mark.parametrize("mark, change", [
    ("distance", lambda log: log[6].update(kl_k1=9)),  # the two estimators disagree
    ("distance", lambda log: [row.update(kl=0.1, kl_k1=0.1) for row in log[1:11]]),  # a late jump
    ("clip", lambda log: [row.update(clip_fraction=0.005) for row in log]),
    ("clip", lambda log: [row.update(clip_fraction=0.25) for row in log]),
    ("advantage", lambda log: log[-1].update(adv_mean=-0.1)),
    ("advantage", lambda log: log[-1].update(adv_std=1.1)),
    ("entropy", lambda log: [row.update(entropy=2.5) for row in log[5:]]),  # a sudden fall
    ("entropy", lambda log: [row.update(entropy=3.5 * 0.92**k)
                             for k, row in enumerate(log)])])  # a slow collapse
def test_each_mark_can_fail_alone(mark, change):
    assert all(row["ok"] for row in health.marks(LOG).values())
    log = copy.deepcopy(LOG)
    change(log)
    assert [name for name, row in health.marks(log).items() if not row["ok"]] == [mark]


def test_axes_and_labels_of_plots():
    axis = svg.Axis("sqrt", 0, 16, 100, 200)  # with ticks at least 22 pixels apart
    assert (axis(0), axis(4), axis(16)) == (100, 150, 200) and axis.ticks() == [0, 1, 4, 10]
    assert (svg.Axis("linear", -0.4, 2.1, 300, 0).ticks() == [0, 0.5, 1, 1.5, 2]
            and svg.Axis("log", 0.01, 100, 0, 4)(1) == 2)
    assert svg.apart([50, 10, 12]) == [50, 10, 24]
    assert "too few" in svg.plot("t", "x", "y", [svg.Line("a", [], [])])
    drawn = svg.plot(NASTY, NASTY, NASTY, [svg.Line(NASTY, [0, 1], [1, 2])])
    assert "<img" not in drawn and "<script" not in drawn
    root = ElementTree.fromstring(svg.standing_alone(drawn))        # a file of its own must be XML
    assert (root.tag == "{http://www.w3.org/2000/svg}svg" and root[0].tag.endswith("style")
            and NASTY in root.attrib["aria-label"])


def test_people_stand_beside_vader():
    """Anna called 2 of 10 base samples happy, 9 of 10 of the policy's. The twin is not shown."""
    anna = {"rater": "anna", "feeling": "positive", "policy": "policy-happy", "base": 2,
            "of_base": 10, "other": 9, "of_other": 10}
    rows = [{"name": "base", "kl": 0.0}, {"name": "policy-happy", "kl": 9.8}]
    line, = plots.by_people({"happy": rows, "ratings": [
        anna, anna | {"feeling": "negative"}, anna | {"of_base": 0}]})
    assert (line.label, line.x, line.y) == ("anna", [0, 9.8], [0.2, 0.9])
    assert (line.low[0] == pytest.approx(0.057, abs=1e-3)
            and line.high[0] == pytest.approx(0.510, abs=1e-3))  # Wilson's interval, from a table


def page_of(out, text):
    """The page of a finished run in which the model, a word and a rater all say `text`."""
    results = report.read_results(out)
    for row in results["happy"]:
        row["shown"] = [{"prompt": text, "tokens": [(text, 0.5, "up2"), ("\n", -2.0, "down4")],
                         **trust.opinions(0.9, -0.5)}]
    results["ratings"] = [{
        "rater": text, "feeling": text, "base": 1, "of_base": 2, "policy": text, "other": 2,
        "of_other": 2, "difference_interval": (0, 1), "p": 0.5}]
    figures = dict.fromkeys("judges risen fallen rewards variety auc predicted calibration "
                            "correlation positive kl clip advantage entropy".split(), "")
    return report.render(results, figures, {
        "versions": {text: text, "date": text, "commit": text}, "inputs": {text: text},
        "stages": {text: {"seconds": 1.0, "settings": {text: text}}}})


def test_the_tables_in_the_terminal(pipeline, capsys):
    """A row for each policy, n, iteration and word, none wider than a terminal; an absent figure is
    an empty cell."""
    results = report.read_results(pipeline[0])
    results["best_of_n"][-1].pop("distinct_2", None)
    table.print_tables(results)
    shown = capsys.readouterr().out
    blocks = dict(block.split("\n", 1) for block in shown.strip().split("\n\n"))
    assert max(map(len, shown.splitlines())) <= 80
    for title, rows in (("Policies towards happy", results["happy"]),
                        ("Best of n samples of the base model", results["best_of_n"]),
                        ("Iterations of PPO", results["ppo"]),
                        ("Words per 1,000", results["risen_words"])):
        lines = [blocks[key] for key in blocks if key.strip() == title][0].splitlines()
        assert len([line for line in lines if line.split()]) - 1 >= len(rows), title
    last = results["best_of_n"][-1]
    assert re.search(rf"^ {last['n']} +{last['kl']:.2f}", shown, re.M)
    assert f"{results['happy'][-1]['kl']:.2f}" in shown


def test_whatever_a_model_says_is_escaped(pipeline):
    page = page_of(pipeline[0], NASTY)
    assert (page.count("<script") == 1 and "<img" not in page and "&lt;script&gt;" in page
            and "they disagree" in page)
    policy = re.search('Content-Security-Policy" content="(.*?)"', page)[1]
    assert ("default-src 'none'" in policy and "script-src 'sha256-" in policy
            and "style-src 'sha256-" in policy and "unsafe" not in policy)


def test_the_page_in_a_browser(pipeline, tmp_path, browser):
    """Arrow keys change the samples; nothing is loaded; 360 pixels and no scripts will do."""
    from selenium.webdriver.common.keys import Keys
    shutil.copy(pipeline[0] / "report.html", tmp_path / "page.html")
    results = json.loads((pipeline[0] / "report.json").read_text())["happy"]
    page = browser(tmp_path / "page.html")
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
    texts = [[" ".join(text.split()) for text in row["samples"][:6]] for row in results]

    def seen():                                                     # the visible samples
        return page.execute_script(
            "return [...document.querySelectorAll('.version .text')].filter(p => p.checkVisibility("
            "{visibilityProperty: true})).map(p => p.innerText.split(/\\s+/).filter(w => w)"
            ".join(' '))")
    assert seen() == texts[0] != texts[-1]
    body, slider = (page.find_element("css selector", name) for name in ("body", ".player input"))
    for key, at in ((Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1)):
        body.send_keys(key)                                         # wherever the focus is
        assert seen() == texts[at]
    slider.send_keys(Keys.ARROW_RIGHT)                              # on the slider: one step, not 2
    assert seen() == texts[2]
    slider.send_keys(Keys.END)
    assert (seen() == texts[-1] and f"{results[-1]['kl']:.2f} nats"
            in page.find_element("css selector", ".stops .on").text)
    assert page.execute_script(
        "return innerWidth == 360 && document.documentElement.scrollWidth <= 360")
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.get_log("browser") == []

    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.refresh()
    assert len(page.find_elements("css selector", ".live")) == 0
    assert seen() == [text for i in range(6) for text in [row[i] for row in texts]]

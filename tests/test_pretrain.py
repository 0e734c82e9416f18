import http.server
import importlib
import math
import threading
import time

import pytest
import torch

from model import RESERVED, UserError

pre = importlib.import_module("01_pretrain")

TEXT = ("ROMEO:\nO, she doth teach the torches to burn bright!\n" * 60)
BOOK = ("\ufeffThe Project Gutenberg eBook\r\nlicence\r\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK 100 ***\r\n" + TEXT.replace("\n", "\r\n")
        + "*** END OF THE PROJECT GUTENBERG EBOOK 100 ***\r\nmore licence")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {"/book": BOOK.encode(), "/plain": TEXT.encode(), "/cut": TEXT.encode()[:500],
                "/latin": ("caf\xe9 " * 999).encode("latin-1"), "/short": b"busy, try again later",
                "/html": b"<!DOCTYPE html><html><body>Sorry, too many requests</body></html>"
                + b" " * 999, "/slow": TEXT.encode()}.get(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(TEXT) if self.path == "/cut" else len(body)))
        self.end_headers()
        step = 10 if self.path == "/slow" else len(body)
        for i in range(0, len(body), step):
            time.sleep(0.05 if self.path == "/slow" else 0)
            try:
                self.wfile.write(body[i:i + step])
            except OSError:
                return

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def fetch(url, **kw):
    return pre.download(url, at_least=1000, **kw)


def test_download_strips_the_licence_and_prints_size_and_hash(server, capsys):
    assert fetch(server + "/book") == TEXT.strip() + "\n"
    assert fetch(server + "/plain") == TEXT.strip() + "\n"
    import hashlib
    assert hashlib.sha256(BOOK.encode()).hexdigest() in capsys.readouterr().out


@pytest.mark.parametrize("path, why", [
    ("/cut", "cut off after 500 of"), ("/html", "HTML page"),
    ("/latin", "not UTF-8: byte 3 is 0xe9"), ("/none", "404"), ("/short", "only 21 bytes")])
def test_download_refuses(server, path, why):
    with pytest.raises(UserError, match=why):
        fetch(server + path)


def test_download_has_a_time_limit_and_survives_refusal(server):
    began = time.time()
    with pytest.raises(UserError, match="slower than"):  # the whole file would take 16 s
        fetch(server + "/slow", limit_s=0.5)
    assert time.time() - began < 3
    with pytest.raises(UserError, match="refused"):
        fetch("http://127.0.0.1:1/x")


def test_corpus_falls_back_and_is_written_whole(server, tmp_path, monkeypatch):
    monkeypatch.setattr(pre, "HERE", tmp_path / "project")
    monkeypatch.setattr(pre.download, "__defaults__", (120, 1000))
    assert pre.find_corpus("", [server + "/cut", server + "/html"]) is None
    assert not (tmp_path / "project" / "data").exists()
    text = pre.find_corpus("", [server + "/none", server + "/book"])
    saved = tmp_path / "project" / "data" / "shakespeare.txt"
    assert text == saved.read_text() == TEXT.strip() + "\n"
    assert pre.find_corpus("", []) == text  # found on disk now


def test_tokenizer_is_lossless_and_reserves_the_last_ids():
    tokenizer = pre.train_tokenizer(TEXT, 280)
    size = tokenizer.get_vocab_size()
    assert ([tokenizer.token_to_id(t) for t in RESERVED] == [size - 3, size - 2, size - 1]
            and size == 280)
    for text in (TEXT, "Ünïcode \u2603 \x00\x7f\n\n  and   spaces", ""):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text and max(ids, default=0) < size - 3
    ids = tokenizer.encode("naïve ☃").ids
    assert sum(len(tokenizer.id_to_token(i)) for i in ids) == len("naïve ☃".encode())


def test_windows_do_not_overlap_and_cover_the_text():
    ids = torch.arange(1000)
    seen = pre.epoch_windows(ids, 64, seed=0)
    assert len(seen.unique()) == seen.numel() >= 1000 - 2 * 64
    assert (seen.diff(dim=1) == 1).all()
    other = pre.epoch_windows(ids, 64, seed=1)
    assert {int(w[0]) % 64 for w in seen} != {int(w[0]) % 64 for w in other}  # another offset


def test_held_out_of_an_untrained_model_is_uniform():
    """An untrained head is zero: every token costs ln(n_text) nats. Bits per byte follow."""
    from model import GPT, GPTConfig
    gpt = GPT(GPTConfig(35, 8, 1, 2, 1, 16))
    ids = torch.randint(32, (50,))
    nats, bits = pre.held_out(gpt, ids, torch.full((35,), 2))
    assert (math.isclose(nats, math.log(32), rel_tol=1e-6)
            and math.isclose(bits, 5 / 2, rel_tol=1e-6))


def test_real_word_share_leaves_out_the_cut_edges():
    assert pre.real_word_share(["xx the king's qqq day yy"], {"the", "king's", "day"}) == 3 / 4


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    scale = [pre.lr_scale(s, 100, 10, 0.5) for s in range(100)]
    assert scale[0] == 0.1 and scale[9:50] == [1.0] * 41 and 0 < scale[99] < 0.03
    assert all(a >= b for a, b in zip(scale[50:], scale[51:]))

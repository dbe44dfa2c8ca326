"""The explorer's page: what it says in a browser is what the library computes, and names cannot escape it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import quote

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import resode
from resode.cli import app
from resode.explorer import NamedSpectrum, explorer_page, read_spectra, spectra_text
from resode.stability import stability_function
from resode.tableaus import METHODS

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(BROWSER is None, reason="no headless Chromium here")
METHODS_TRIED = ("euler", "heun2", "ssprk3", "rk4", "dopri5", "tsit5", "dopri8", "trapezoid", "radau5", "kvaerno5",
                 "rkc1_5", "rkc2_8", "rkl2_20")  # fmt: skip
EVIL = '</script><script>document.title="gone"</script><img src=x onerror=alert(1)>'


def spectra(count=50, seed=0):
    """Decaying, oscillating, growing, real, stiff and one beside the axis: what limits a step in every way."""
    rng = np.random.default_rng(seed)
    found = []
    for n in range(count):
        size = int(rng.integers(2, 24))
        x = rng.normal(size=(size, size)) / np.sqrt(size)
        matrix = {
            0: x - 1.2 * np.eye(size),  # a disc in the left half-plane
            1: x - x.T - 0.01 * n * np.eye(size),  # beside the imaginary axis
            2: -x @ x.T * 10 ** rng.uniform(-2, 3),  # on the real axis, stiff
            3: x - x.T,  # on the imaginary axis
            4: x,  # with growing modes
        }[n % 5]
        values = np.linalg.eigvals(matrix)
        found.append(NamedSpectrum(f"{n} of {size}", float(rng.uniform(0.05, 2)), tuple(values.tolist())))
    return found


def in_page(page, tmp_path, script, arguments=()):
    """What `script` makes of the page in a headless browser: `page` is its window, `done(value)` the answer."""
    place = tmp_path / "page.html"
    place.write_text(page, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe src="file://{quote(str(place))}" width="1200" height="900"></iframe><pre id="o"></pre>'
        "<script>const done=v=>{document.getElementById('o').textContent='FOUND'+JSON.stringify(v)+'END'};"
        "onload=()=>{const page=document.querySelector('iframe').contentWindow;const doc=page.document;"
        "const wait=()=>page.draw();"  # at once: a headless browser's frames come when they like
        "const at=i=>doc.getElementById(i);"
        "const set=(i,v,kind='change')=>{at(i).value=v;at(i).dispatchEvent(new page.Event(kind))};"
        f"try{{{script}}}catch(e){{done('error: '+e.stack)}}}}</script>"
    )
    dom = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", *arguments, "--dump-dom", f"file://{frame}"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    (text,) = re.findall(r"FOUND(.*)END</pre>", dom, flags=re.S)
    found = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert not str(found).startswith("error:"), found
    return found


@in_browser
def test_the_page_and_the_library_agree_on_50_spectra(tmp_path):
    """Under explicit, implicit and stabilised methods: the printed limits within 1e-7, and which are within.

    The page looks for the first exit by values of |R| where the library isolates roots exactly; a grazing
    contact may cost digits, hence 1e-7 and not 1e-12.
    """
    of = spectra()
    script = """
    const found = {};
    for (const name of METHODS) {
      set('method', name); wait();
      found[name] = [...at('limits').tBodies[0].rows].map(r => [r.dataset.step, r.dataset.decaying, +r.dataset.growing, r.cells[6].textContent]);
    }
    done(found);""".replace("METHODS", json.dumps(METHODS_TRIED))
    page = explorer_page(of, methods=("euler", *(m for m in METHODS_TRIED if m not in METHODS)))
    found = in_page(page, tmp_path, script)
    finite = 0
    for method in METHODS_TRIED:
        for spectrum, (step, decaying, growing, here) in zip(of, found[method], strict=True):
            values, where = np.array(spectrum.eigenvalues), f"{method}, spectrum {spectrum.name}"
            limit = resode.max_stable_step(eigenvalues=values, solver=method)
            assert float(step) == pytest.approx(limit, rel=1e-7), where
            if growing:
                exact = resode.step_limit(eigenvalues=values, solver=method)
                assert growing == len(exact.growing) and limit == 0, where
                limit = exact.decaying_step
            assert float(decaying) == pytest.approx(limit, rel=1e-7), where
            if abs(spectrum.step - limit) > 1e-6 * spectrum.step:
                assert here.startswith("within") == (spectrum.step <= limit), where
            finite += 0 < limit < np.inf
    assert finite > 250, "most of these limits are figures, neither 0 nor inf"


@in_browser
def test_r_from_the_tableaus_in_the_page_is_the_librarys(tmp_path):
    """At 30 points for every method: by the coefficients that came, and from A and b by the page alone."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=30) * 2 - 1.5 + 2j * rng.normal(size=30)
    names = [*METHODS, "rkc2_12", "rkl1_7"]
    script = f"""
    const z = {json.dumps([[v.real, v.imag] for v in z])};
    done([...at('method').options].map(({{ value }}) => {{
      set('method', value);
      const m = page.method();
      const own = m.a ? {{ ...page.coefficientsOf(m.a, m.b), stages: m.stages }} : m;
      return [value, z.map(([x, y]) => [...page.factor(m, x, y), ...page.factor(own, x, y)])];
    }}));"""
    page = explorer_page(methods=("euler", "rkc2_12", "rkl1_7"))
    found = dict(in_page(page, tmp_path, script))
    assert sorted(found) == sorted(names)
    for name in names:
        right = stability_function(name, torch.as_tensor(z)).numpy()
        values = np.array(found[name])
        for part in (values[:, :2], values[:, 2:]):
            error = np.abs(part[:, 0] + 1j * part[:, 1] - right) / (1 + np.abs(right))
            assert error.max() < 1e-9, name


@in_browser
def test_what_a_stepped_field_does_is_what_its_map_does(tmp_path):
    """Euler on the logistic field is the logistic map: it converges up to η = 1, flips to 2, cycles, diverges.

    At η = 2 the fixed point's multiplier 1 − η is −1, at √6 the cycle of two ends, above 3 everything leaves.
    """
    script = """
    const say = eta => { set('eta-value', eta, 'input'); wait(); return at('fate').dataset.fate; };
    set('field', 'logistic');
    const found = {};
    for (const eta of [0.3, 0.9, 1.5, 1.9, 2.2, 2.4, 2.5, 3.5]) found[eta] = say(eta);
    set('method', 'implicit_euler'); found.implicit = say(20);
    set('method', 'euler'); set('field', 'linear');
    for (const eta of [0.5, 1.5, 2.5]) found['linear' + eta] = say(eta);
    done(found);"""
    found = in_page(explorer_page([NamedSpectrum("one", 1.0, (-1 + 0j,))]), tmp_path, script)
    assert [found[k] for k in ("0.3", "0.9")] == ["converges"] * 2
    assert [found[k] for k in ("1.5", "1.9")] == ["flips, and converges"] * 2
    assert found["2.2"] == found["2.4"] == "cycles, with 2 steps" and found["2.5"] == "cycles, with 4 steps"
    assert found["3.5"] == "diverges" and found["implicit"] == "converges"
    assert [found[f"linear{e}"] for e in (0.5, 1.5, 2.5)] == ["converges", "flips, and converges", "diverges"]


@in_browser
def test_a_method_and_eigenvalues_of_ones_own(tmp_path):
    """Heun's tableau, typed, allows 2/5 for λ = −5; what is no number or no method is refused in words."""
    script = """
    const click = i => { at(i).click(); wait(); };
    const found = {};
    at('typed').value = '−5, -0.5+3i, -0.5 - 3i, 2i, -i'; click('typed-use');
    found.names = [...at('limits').tBodies[0].rows].map(r => r.cells[1].textContent);
    at('typed').value = '-5, -0.1+0.2i'; click('typed-use'); click('own-use');
    const row = [...at('limits').tBodies[0].rows].at(-1);
    found.step = +row.dataset.step; found.about = at('about').textContent;
    for (const b of ['1/2 x', '1/2 1/3', '1/2 1/2 0']) { at('own-b').value = b; click('own-use'); found[b] = at('own-error').textContent; }
    for (const t of ['abc', '<b>', '']) { at('typed').value = t; click('typed-use'); found['typed ' + t] = at('typed-error').textContent; }
    at('method').value = 'rk4'; set('method', 'rk4'); click('to-limit'); found.eta = +at('eta-value').value;
    found.verdict = at('verdict').textContent;
    done(found);"""
    found = in_page(explorer_page(), tmp_path, script)
    assert found["names"] == ["3", "5"]
    assert found["step"] == pytest.approx(
        resode.max_stable_step(eigenvalues=[-5, -0.1 + 0.2j], solver="heun2"), rel=1e-7
    )
    assert found["about"].startswith("own: order 2, 2 stages, explicit")
    assert (
        "Numbers and fractions" in found["1/2 x"]
        and "sum to 1" in found["1/2 1/3"]
        and "3 rows" in found["1/2 1/2 0"]
    )
    assert "“abc” is no number" in found["typed abc"] and "“<b>”" in found["typed <b>"] and found["typed "]
    assert found["eta"] == pytest.approx(
        resode.max_stable_step(eigenvalues=[-5, -0.1 + 0.2j], solver="rk4"), rel=1e-5
    )
    assert found["verdict"].startswith("rk4: within the limit")


@in_browser
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_the_page_fits_every_screen_and_follows_the_keys(tmp_path, width):
    script = f"""
    const frame = document.querySelector('iframe'); frame.width = {width}; wait();
    const e = doc.documentElement;
    const wide = [...doc.querySelectorAll('section')].filter(s => s.scrollWidth > s.clientWidth).length;
    const key = k => {{ at('plane').dispatchEvent(new page.KeyboardEvent('keydown', {{key: k}})); wait(); }};
    const before = +at('eta-value').value; key('ArrowUp'); const after = +at('eta-value').value;
    const names = []; for (let n = 0; n < 4; n++) {{ key('ArrowRight'); names.push(at('chosen').textContent); }}
    const small = [...doc.querySelectorAll('button,select')].filter(b => b.offsetParent && b.getBoundingClientRect().height < 34).length;
    done([e.clientWidth, e.scrollWidth, before, after, new Set(names).size, small, doc.title, wide]);"""
    page = explorer_page(spectra(3), title=EVIL)
    inner, scroll, before, after, chosen, small, title, wide = in_page(
        page, tmp_path, script, ["--window-size=1700,1000"]
    )
    assert scroll <= inner <= width and wide == 0
    assert after == pytest.approx(1.02 * before, rel=1e-5) and chosen == 4 and small == 0
    assert title == EVIL, "a title is text"


@in_browser
def test_names_stay_text(tmp_path):
    script = """wait(); set('block', '0'); wait();
    done([doc.images.length, doc.scripts.length, at('limits').tBodies[0].rows[0].cells[0].textContent, doc.title]);"""
    page = explorer_page([NamedSpectrum(EVIL, 1.0, (-1 + 0j,))], title="T", source=EVIL)
    assert in_page(page, tmp_path, script) == [0, 2, EVIL, "T"]
    assert page.count("</script>") == 2 and "<img" not in page


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [(tag, name) for name, _ in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_asks_for_nothing():
    page = explorer_page(spectra(2))
    assert Tags(page).links == [] and not re.search(
        r"https?:|@import|url\(|fetch\(|XMLHttp|innerHTML|eval\(", page
    )
    assert "default-src 'none'" in page


def test_the_command_takes_nothing_a_table_or_a_profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    assert run(app, ["explore"]).exit_code == 0 and (tmp_path / "explore.html").stat().st_size > 50_000
    of = spectra(4)
    (tmp_path / "eigenvalues.csv").write_text(spectra_text(of))
    assert read_spectra(tmp_path / "eigenvalues.csv") == of, "to the last digit"
    result = run(app, ["explore", "eigenvalues.csv", "-o", "a.html", "--methods", "rk4,rkl2_8"])
    assert result.exit_code == 0 and '"rkl2_8"' in (tmp_path / "a.html").read_text()
    network = resode.networks.build("odenet20", width=4).eval()
    resode.profile_depth(network, torch.zeros(1, 3, 8, 8), lesions=False).to_csv(tmp_path / "profile.csv")
    found = read_spectra(tmp_path / "profile.csv")
    assert len(found) > 5 and all(1 <= len(s.eigenvalues) <= 10 for s in found)
    (tmp_path / "plain.csv").write_text("-1,2\n-1,-2\n")
    assert read_spectra(tmp_path / "plain.csv")[0].eigenvalues == (-1 + 2j, -1 - 2j)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("real,imaginary\n-1,0\n-2,zero\n", "line 3: 'zero' in column imaginary is no finite number"),
        ("real,imaginary\n-1,nan\n", "line 2: 'nan' in column imaginary"),
        ("real,imaginary\n-1,0\n\n-1e999,0\n", "line 4: '-1e999' in column real"),
        ("real,imaginary\n-1\n", "line 2: 1 cells under 2 columns"),
        ("block,step,real,imaginary\na,0,-1,0\n", "line 2: a step must be above 0, got 0"),
        ("block,step,real,imaginary\na,1,-1,0\na,2,-1,0\n", "line 3: block 'a' has the steps 1 and 2"),
        ("a,b\n1,2\n", "has the columns a, b: eigenvalues need real and imaginary"),
        ("", "is empty"),
        ("real,imaginary\n", "holds no eigenvalue"),
        ('real,imaginary\n"1,2\n', "no table of comma-separated values"),
    ],
)
def test_tables_of_something_else_are_refused(tmp_path, text, said):
    (tmp_path / "eigs.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_spectra(tmp_path / "eigs.csv")


def test_a_table_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "eigs.csv").write_bytes(b"\xff\xfe\x00real")
    with pytest.raises(ValueError, match="is no text"):
        read_spectra(tmp_path / "eigs.csv")
    result = CliRunner().invoke(app, ["explore", str(tmp_path / "none.csv")])
    assert result.exit_code == 2 and "Traceback" not in result.output

"The reading page of the real study: its numbers are those of the tables beside it, and its sentences stand where their intervals say."
import functools, re, shutil
from pathlib import Path
import pandas as pd, pytest
from cdfss.basics import InputError
from cdfss.report.claims import verdict
from cdfss.report.page import SECTIONS, Tables, fill, main, problems, write_page
from cdfss.report.real import ClaimOptions, tell

ROOT = Path(__file__).parent.parent
REAL = ROOT/'figures'/'real'
EMPTY = ''.join(f'## {h}\n\n' for h in SECTIONS)

def test_the_committed_page_is_what_its_template_becomes():
    assert fill((REAL/'README.md.in').read_text(), REAL) == (REAL/'README.md').read_text(), 'run: python -m cdfss.report.page figures/real'

def test_the_readme_says_of_the_study_what_its_page_says():
    told = next(l for l in (ROOT/'README.md').read_text().splitlines() if '(figures/real/README.md)' in l)
    number = re.compile(r'[-\d.]+ \[-?\d[\d.]*, -?\d[\d.]*\]')
    assert number.findall(told) and not set(number.findall(told)) - set(number.findall((REAL/'README.md').read_text()))

@pytest.fixture
def folder(tmp_path):
    for f in (*REAL.glob('*.csv'), REAL/'README.md.in'): shutil.copy(f, tmp_path)
    return tmp_path

@functools.cache
def changes(said):
    "Placeholders of the committed results whose interval says so."
    t = Tables(REAL).table('results.csv')
    t = t[(t.base != '') & (t.change_low != '') & (t.backbone == t.backbone.iloc[0])]
    return [f'{{change: {r.method}, {r.target}, {r.shot}}}' for r in t.itertuples() if verdict(float(r.change_low), float(r.change_high)) == said]

def put(text, heading, line): return text.replace(f'## {heading}\n', f'## {heading}\n\n{line}\n', 1)

@pytest.mark.parametrize('heading', SECTIONS)
@pytest.mark.parametrize('said', SECTIONS.values())
def test_a_sentence_stands_where_its_interval_says(heading, said):
    p = changes(said)[0]
    bad = problems(put(EMPTY, heading, f'* **It** moves by {p}.'), REAL)
    if said == SECTIONS[heading]: assert not bad
    else: assert len(bad) == 1 and bad[0].startswith('README.md.in, line') and f"stands under '{heading}', and {p} is " in bad[0] and bad[0].endswith(said)

def test_a_remark_under_what_reproduces_must_be_told_too():
    text, unsure, sure = EMPTY, changes('cannot tell')[0], changes('holds')[0]
    [bad] = problems(put(text, 'What reproduces', f'* **It** gains {sure}. Also {unsure} elsewhere.'), REAL)
    assert f'{unsure} is' in bad and "does not belong under 'What reproduces'" in bad
    assert not problems(put(text, 'What reproduces', f"* **It** gains {sure}. But it loses {changes('does not hold')[0]} elsewhere."), REAL)
    assert not problems(put(text, 'What cannot be told', f'* **It** {unsure}. Also {sure} elsewhere.'), REAL)
    two = problems(put(text, 'What reproduces', f'* **One** gains {sure}. **Another** gains {unsure}.'), REAL)
    assert len(two) == 1 and 'Another' in two[0]

@pytest.mark.parametrize('typed', ['+8.4 [6.6, 10.2]', '[6.6, 10.2]', '[-1.9, 15.2]', '-0.2', '+3', '\u22123.1', '17.3', '38 points', '1 point', '\u00b12', '**+1.0**', '(+1.0)', 'x[0.1]: 0.5'])
def test_no_number_is_typed(typed):
    bad = problems(EMPTY + f'\nOur gain is {typed} here.\n', REAL)
    assert bad and all('is typed' in b for b in bad)

@pytest.mark.parametrize('fine', ['ResNet-18 at 224 px, 3x3, 5-shot, 1,000 photographs, 95 % t-intervals', '`lr=0.001` and `-p minutes 9.5`', '[tuned_3.csv](tuned_3.csv) of 2026-11-21', '{cited: +14}', 'more than {cited: 10 points}', 'p = 1'])
def test_what_is_no_result_is_typed(fine): assert not problems(EMPTY + f'\n{fine}.\n', REAL)

@pytest.mark.parametrize('words', ['it holds', 'it does not hold', 'one cannot tell', 'both hold'])
def test_verdicts_are_not_typed(words):
    [bad] = problems(put(EMPTY, 'What reproduces', f"* **It** gains {changes('holds')[0]}, {words}."), REAL)
    assert 'is typed: let {verdict: ...} say it' in bad

@pytest.mark.parametrize('given,said', [('{chnge: ssp+lcm, far, 1}', "unknown placeholder 'chnge': did you mean 'change'"), ('{change: ssp+lmc, far, 1}', "did you mean 'ssp+lcm'"), ('{change: ssp+lcm, fra, 1}', "did you mean 'far'"),
                                        ('{change: ssp+lcm, far, 9}', "unknown shot of results.csv '9'"), ('{change: ssp, far, 1}', 'is a base'), ('{change: far, 1}', 'expected METHOD, TARGET, SHOT'), ('{}', "unknown placeholder ''"),
                                        ('{claim: no such thing}', '0 claims'), ('{claim: gains}', 'claims with'), ('{cell: results.csv, fb_iou, method=ssp}', 'name its'), ('{cell: results.csv, fb}', "unknown column of results.csv 'fb'"),
                                        ('{cell: clams.csv, value}', "did you mean 'claims.csv'"), ('{open', "a '{' that is no placeholder's"), ('shut}', "a '}' that is no placeholder's"), ('{span: results.csv, change, shot=1}', 'three columns')])
def test_what_cannot_be_filled_is_one_line(given, said):
    [bad] = problems(EMPTY + f'\n{given}\n', REAL)
    assert said in bad and '\n' not in bad and bad.startswith('README.md.in, line ')

def test_numbers_follow_the_tables(folder):
    p = changes('holds')[0]
    method, target, shot = p[len('{change: '):-1].rsplit(', ', 2)
    (folder/'README.md.in').write_text(put((REAL/'README.md.in').read_text(), 'What reproduces', f'* **It** gains {p}.'))
    write_page(folder)
    was = (folder/'README.md').read_text()
    t = pd.read_csv(folder/'results.csv', dtype=str, keep_default_na=False)
    at = (t.method == method) & (t.target == target) & (t.shot == shot) & (t.backbone == t.backbone.iloc[0])
    t.loc[at, ['change', 'change_low', 'change_high']] = '71.23', '70.16', '72.34'
    t.to_csv(folder/'results.csv', index=False)
    write_page(folder)
    assert '**It** gains +71.2 [70.2, 72.3].' in (folder/'README.md').read_text() and '71.2' not in was
    t.loc[at, 'change_low'] = '-0.1'
    t.to_csv(folder/'results.csv', index=False)
    kept, said = (folder/'README.md').read_text(), []
    with pytest.raises(InputError, match="stands under 'What reproduces'"): write_page(folder, said.append)
    assert (folder/'README.md').read_text() == kept and said and all(l.startswith('README.md.in, line') for l in said)

def test_make_real_figures_fills_it(folder):
    said = []
    assert 'real:' in tell(ClaimOptions(runs=str(folder/'none'), figures=str(folder)), said.append) and (folder/'README.md').read_text() == (REAL/'README.md').read_text()
    (folder/'README.md.in').write_text('# A page without sections\n')
    with pytest.raises(InputError, match="no section '## What reproduces' [(]and 2 more[)]"): tell(ClaimOptions(runs=str(folder/'none'), figures=str(folder)), said.append)
    assert 'LoEC: ' in said[-1]                                                        # the verdicts are told all the same

def test_the_command(folder, capsys):
    assert main([str(folder)]) == 0 and (folder/'README.md').exists()
    assert main([str(folder), 'known']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(l.startswith('{change: ssp+pcmt, far, 1}') for l in lines) and any(l.startswith('{claim: PCMT gains on ISIC}') for l in lines) and any(l.startswith('{tuned: ') for l in lines)
    assert len(lines) == len(set(lines))
    assert main([str(folder/'none')]) == 1 and main([str(folder), 'knwn']) == 1 and 'README.md.in: no such file' in capsys.readouterr().err

"The notebooks as files, and the run notebook as a user starts it: through papermill, in a process of its own."
import json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest, torch
from papermill import inspect_notebook
from cdfss.__main__ import main as command
from cdfss.basics import InputError
from cdfss.report import run as report
from cdfss.report.leaderboard import read_board
from cdfss.engine.runs import Run, parameters_cell
from cdfss.diagnostics.diagnosis import DiagnoseOptions
from cdfss.engine.train import EVALUATE_SECTIONS, SECTIONS, EvaluateSettings, TrainSettings
from cdfss.report.figures import FigureOptions, StudyOptions
from cdfss.report.real import ClaimOptions, RealOptions
from cdfss.report.sweeps import SweepOptions
from test_resume import same

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
TOLD = [ROOT/'nbs'/'protocols.ipynb']                                       # a story: no parameters, no exported cell
RUN = [p for p in NOTEBOOKS if p.parent == ROOT/'nbs' and not p.name[0].isdigit() and p not in TOLD]
LIBRARY = [p for p in NOTEBOOKS if p not in RUN + TOLD]
named = dict(ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())

def cells(path, kind='code'): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]
def source(cell): return ''.join(cell['source'])
def tagged(path): return [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]

# ---- as files ---------------------------------------------------------------------------------------------------------------
def test_there_are_both_kinds(): assert ROOT/'nbs'/'train.ipynb' in RUN and len(LIBRARY) > 10

@pytest.mark.parametrize('path', RUN, **named)
def test_run_notebooks_are_ready_for_papermill(path):
    assert len(tagged(path)) == 1, 'exactly one cell tagged `parameters`: nbdev_clean drops tags unless settings.ini allows them'
    book = json.loads(path.read_text())
    assert book['metadata']['kernelspec']['name'] == 'python3' and book['nbformat'] == 4
    assert not [o for c in cells(path) for o in c['outputs']] and all(c['execution_count'] is None for c in cells(path))
    assert not [c for c in cells(path) if re.search(r'^#\|\s*(export|default_exp)', source(c), re.M)]

@pytest.mark.parametrize('path', NOTEBOOKS, **named)
def test_notebooks_are_small_and_titled(path):
    assert path.stat().st_size < 1_200_000
    title = next(c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown')
    assert re.match(r'# \S', source(title))
    ids = [c['id'] for c in json.loads(path.read_text())['cells']]
    assert len(set(ids)) == len(ids)

@pytest.mark.parametrize('path', LIBRARY, **named)
def test_library_notebooks_export(path):
    code = [source(c) for c in cells(path)]
    assert any(re.search(r'^#\|\s*export', c, re.M) for c in code) and sum('#| default_exp' in c for c in code) == 1
    assert not tagged(path)
    module = ROOT/'cdfss'/(re.search(r'#\| default_exp (\S+)', '\n'.join(code))[1].replace('.', '/') + '.py')
    assert module.exists() and path.name in module.read_text()[:200]
    assert not [o for c in cells(path) for o in c['outputs'] if o['output_type'] == 'error']

@pytest.mark.parametrize('path', RUN, **named)
def test_papermill_reads_every_parameter(path, caplog):
    names = re.findall(r'^(\w+):', source(tagged(path)[0]), re.M)
    assert list(inspect_notebook(str(path))) == names and names and not [r for r in caplog.records if 'parse' in r.message]

@pytest.mark.parametrize('name,settings,sections', [('train', TrainSettings, SECTIONS), ('evaluate', EvaluateSettings, EVALUATE_SECTIONS), ('study', StudyOptions, {}),
                                                    ('figures', FigureOptions, {}), ('sweep', SweepOptions, {}), ('diagnose', DiagnoseOptions, {}), ('real', RealOptions, {}), ('claims', ClaimOptions, {})])
def test_the_parameters_cell_is_that_of_the_settings(name, settings, sections):
    [cell] = tagged(ROOT/'nbs'/f'{name}.ipynb')
    assert source(cell) == parameters_cell(settings, sections)

MACHINE_PATH = re.compile(r'(^|[^\w.-])/(work|root|home|tmp)/', re.M)

def words(path) -> str:
    "What is written in a file; of a notebook, sources and textual outputs."
    if path.suffix != '.ipynb': return path.read_text()
    book, text = json.loads(path.read_text())['cells'], lambda v: ''.join(v) if isinstance(v, (list, str)) else ''
    outputs = [o for c in book for o in c.get('outputs', [])]
    return '\n'.join([*map(source, book), *(text(o.get('text')) for o in outputs),
                      *(text(v) for o in outputs for k, v in o.get('data', {}).items() if not k.startswith('image/'))])

def test_no_path_of_a_machine_is_tracked():
    assert all(MACHINE_PATH.search(f'{before}/{d}/x') for before in ('', 'in ', '"', '=') for d in ('home', 'work', 'root', 'tmp'))
    assert not any(MACHINE_PATH.search(t) for t in ('a.b/tmp/x', 'data/work/y', '~/home', '/tmpfile', '/homes/x'))
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip('no git here')
    files = [ROOT/f for f in listed.stdout.split('\n') if f.endswith(('.ipynb', '.py', '.md', '.toml', '.ini')) or f in ('Makefile', '.ci/run')]
    found = [f'{f.relative_to(ROOT)}: {m[0]}' for f in files if f.exists() for m in MACHINE_PATH.finditer(words(f))]
    assert not found

# ---- as a user runs it ------------------------------------------------------------------------------------------------------
papermill = shutil.which('papermill', path=str(Path(sys.executable).parent))
SMALL = dict(epochs=1, fit_episodes=16, test_episodes=8, track_episodes=8, targets='isic', shots=1)

def execute(folder, *output, **given):
    "The command of the README with other parameters, started in `folder`."
    values = [a for k, v in (SMALL | dict(runs=str(folder/'runs')) | given).items() for a in ('-p', k, str(v))]
    return subprocess.run([papermill, str(ROOT/'nbs'/'train.ipynb'), *output, *values], cwd=folder, capture_output=True, text=True, timeout=900)

BAD = dict(methd='lcm', epochs='two', data_root='nowhere', weights='nofile.pth')

@pytest.fixture(scope='module')
def commands(tmp_path_factory):
    "Name -> (folder, finished process) of every command below, two at a time; `output` repeats `plain` with an output path."
    where = {name: tmp_path_factory.mktemp(name) for name in ('plain', 'output', *BAD)}
    with ThreadPoolExecutor(2) as pool:
        done = {name: pool.submit(execute, where[name], **given) for name, given in [('plain', {}), *((k, {k: v}) for k, v in BAD.items())]}
        done['plain'].result()
        done['output'] = pool.submit(execute, where['output'], 'out.ipynb', runs=where['plain']/'runs')
        return {name: (where[name], d.result()) for name, d in done.items()}

@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_without_an_output_path(commands):
    folder, done = commands['plain']
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = [p for p in (folder/'runs').iterdir() if p.is_dir()]
    assert path.name in set(read_board(folder/'runs'/'leaderboard.csv')['run'])
    run = Run(path)
    assert run.complete and path.name.startswith('ssp+lcm-') and not (path/'resume').exists()
    assert {'params.json', 'env.json', 'metrics.json', 'weights.safetensors', 'history.csv', 'episodes.parquet', 'samples.npz'} <= {p.name for p in path.iterdir()}
    assert run.params['epochs'] == 1 and run.params['shots'] == '1' and {(r['method'], r['target']) for r in run.metrics['results']} == {('ssp', 'isic'), ('ssp+lcm', 'isic')}
    assert sorted(p.name for p in folder.iterdir()) == ['runs'], 'something was written beside the run folder'
    json.loads(done.stdout)                                                   # papermill prints the executed notebook
    kept = list(path.glob('*.ipynb'))
    assert len(kept) == 1, 'the executed notebook is kept in the run folder'
    executed(kept[0])

@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_command_without_papermill_leaves_the_same_record(commands, tmp_path, monkeypatch, capsys):
    "`python -m cdfss train` on a machine that has no papermill: everything but the executed notebook, to the byte but for clock times."
    monkeypatch.setattr(report, 'find_spec', lambda name: None)
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))                  # as many as the notebook's kernel had
    command(['train', *(f'{k}={v}' for k, v in (SMALL | dict(runs=str(tmp_path/'runs'))).items())])
    [path], [own] = ([p for p in (folder/'runs').iterdir() if p.is_dir()] for folder in (tmp_path, commands['plain'][0]))
    files = lambda run: {p.relative_to(run).as_posix() for p in run.rglob('*') if p.is_file()}
    assert files(own) - files(path) == {'train.ipynb'} and files(path) <= files(own) and {'figures/trajectory.csv', 'figures/predictions.png'} <= files(path)
    same(Run(path), Run(own), but={'train.ipynb'})
    assert (path/'figures'/'trajectory.csv').read_bytes() == (own/'figures'/'trajectory.csv').read_bytes()
    params = [{k: v for k, v in Run(p).params.items() if k != 'runs'} for p in (path, own)]
    assert params[0] == params[1] and path.name in set(read_board(tmp_path/'runs'/'leaderboard.csv')['run'])
    said = capsys.readouterr().out
    assert 'ssp+lcm' in said and 'isic 1-shot' in said and 'metrics.json' in said and '1/1' in said

@pytest.mark.parametrize('words,said', [([], 'no command: expected train'), (['trian'], 'trian: expected train'), (['train', 'lcm'], "'lcm': expected name=value"),
                                        (['train', 'methd=lcm'], "unknown parameter 'methd': did you mean 'method'?"), (['train', 'epochs=two'], "epochs='two' is str, expected int")])
def test_a_bad_command_line_is_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as e: command(words)
    assert said in str(e.value) and '\n' not in str(e.value) and not list(tmp_path.iterdir())

PICTURES = ['preview', 'trajectory', 'predictions']

def executed(path):
    book = json.loads(path.read_text())
    outputs = [o for c in book['cells'] if c['cell_type'] == 'code' for o in c['outputs']]
    assert not [o for o in outputs if o['output_type'] == 'error']
    drawn = [''.join(c['source']) for c in book['cells'] if c['cell_type'] == 'code' and any('image/png' in o.get('data', {}) for o in c['outputs'])]
    assert [next(n for n in PICTURES if f'report.{n}(' in s) for s in drawn] == PICTURES
    assert any('isic' in ''.join(o.get('text', '')) for o in outputs)

@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_again_with_an_output_path(commands):
    folder, done = commands['output']
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in folder.iterdir()] == ['out.ipynb'] and 'finished before' in (folder/'out.ipynb').read_text()
    executed(folder/'out.ipynb')

@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize('name,said', [('methd', "unknown parameter 'methd': did you mean 'method'?"), ('epochs', "epochs='two' is str, expected int"),
                                       ('data_root', 'data_root=nowhere: no such folder'), ('weights', 'weights=nofile.pth: no such file')])
def test_a_bad_command_ends_in_one_clear_line(commands, name, said):
    folder, done = commands[name]
    last = done.stderr.strip().split('\n')[-1]
    assert done.returncode == 1 and last.startswith('SystemExit: error: ') and said in last, done.stderr[-2000:]
    assert not list(folder.rglob('*')), 'nothing is computed or written'

"The package as a wheel: it carries the miniature's weights, and works where there are no notebooks and no notebook tooling."
import json, os, subprocess, sys, zipfile
import pytest

@pytest.fixture(scope='module')
def installed(repo, tmp_path_factory):
    "A wheel, built from a copy of what is packaged, unpacked into an empty folder."
    work = tmp_path_factory.mktemp('wheel')
    copy = work/'source'
    copy.mkdir()
    for name in ('pyproject.toml', 'README.md', 'LICENSE'): (copy/name).write_bytes((repo/name).read_bytes())
    subprocess.run(['cp', '-r', str(repo/'cdfss'), str(copy/'cdfss')], check=True)
    r = subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--skip-dependency-check', '-o', str(work), str(copy)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    [wheel] = work.glob('*.whl')
    with zipfile.ZipFile(wheel) as z: z.extractall(work/'site')
    return work/'site'

def test_wheel_carries_weights_and_all_modules(installed, repo):
    packed = {str(p.relative_to(installed)) for p in installed.rglob('*') if p.is_file()}
    wanted = {str(p.relative_to(repo)) for p in (repo/'cdfss').rglob('*') if p.suffix in ('.py', '.json', '.safetensors')}
    assert wanted <= packed, sorted(wanted - packed)
    assert 'cdfss/assets/miniature_resnet.safetensors' in packed and not any(p.endswith('.ipynb') for p in packed)

BLOCKED = '''
import sys
class Block:
    names = ('nbdev', 'fastcore', 'execnb', 'papermill', 'IPython', 'ipywidgets', 'ipykernel', 'nbformat', 'jupyterlab')
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in self.names: raise ImportError(f'{name} is not to be imported by the package')
sys.meta_path.insert(0, Block())
'''

def test_a_run_from_the_wheel_without_notebook_tooling(installed, tmp_path):
    code = BLOCKED + '''
import json
from cdfss.engine.train import TrainSettings, train
import cdfss, cdfss.report.run as report
run = train(TrainSettings(method='loec', epochs=1, fit_episodes=8, test_episodes=30, track='none', shots='1', targets='chest', samples=3))
report.keep_notebook(run); report.trajectory(run); report.predictions(run)
print(json.dumps([cdfss.__file__, run.complete, len(run.metrics['results'])]))
'''
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(installed)})
    assert r.returncode == 0, r.stderr[-2000:]
    where, complete, n = json.loads(r.stdout.strip().split('\n')[-1])
    assert where.startswith(str(installed)) and complete and n == 2

"The real study on made-up pictures in the published layouts: data known file by file, a plan that can be stopped, and numbers that are what the records say. Tests marked `real` read the real pictures."
import dataclasses, json, os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from cdfss.basics import InputError, write_json
from cdfss.data import subsets
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.data.subsets import check_subset, make_subset, manifest_hash, read_subset, subset_manifests, subset_names
from cdfss.report import real
from cdfss.report.real import NEAR, SOURCE, TARGETS, Job, Progress, RealOptions, change, claims_text, plan, report, score_table, work
from cdfss.report.page import SECTIONS
from fakes import blob, picture, voc

ROOT = Path(__file__).parent.parent

COUNTS = dict(davis=12, isic=18, chest=7, nuclei=7, cracks=7)

def made_up(root):
    "All six data sets, tiny."
    voc(root, {f'p{i:02d}': [1, 2] for i in range(20)})
    def pair(image, mask, seed):
        picture(root/image, seed); blob(root/mask, seed)
    for i in range(7):
        pair(f'LungSegmentation/CXR_png/{i}.png', f'LungSegmentation/masks/{i}.png', i)
        pair(f'CrackForest/image/{i}.jpg', f'CrackForest/masks/{i}.png', 20 + i)
        pair(f'DSB2018/stage1_train/{i}/images/{i}.png', f'DSB2018/stage1_train/{i}/mask.png', 40 + i)
    for c in range(2):
        for i in range(6): pair(f'DAVIS/JPEGImages/480p/o{c}/{i:05d}.jpg', f'DAVIS/Annotations/480p/o{c}/{i:05d}.png', 60 + 6*c + i)
    names = ('nevus', 'melanoma', 'seborrheic_keratosis')
    for i in range(18): pair(f'ISIC/ISIC2018_Task1-2_Training_Input/I{i}.jpg', f'ISIC/ISIC2018_Task1_Training_GroundTruth/I{i}_segmentation.png', 80 + i)
    (root/'ISIC/class_id.csv').write_text('ID,Class\n' + ''.join(f'I{i},{names[i % 3]}\n' for i in range(18)))
    return root

@pytest.fixture(scope='module')
def data(tmp_path_factory): return made_up(tmp_path_factory.mktemp('real')/'data')

@pytest.fixture(scope='module')
def records(data, tmp_path_factory):
    "Records of the made-up subsets in the place of the shipped ones."
    folder, was = tmp_path_factory.mktemp('assets'), subsets.ASSETS
    for name in (SOURCE, *TARGETS): write_json(folder/f'subset_{name}.json', dataclasses.asdict(make_subset(name, data, 'made up', *(('balanced', 6) if name != SOURCE else ()))))
    subsets.ASSETS = folder
    yield folder
    subsets.ASSETS = was

@pytest.mark.parametrize('name', COUNTS)
def test_the_list_is_what_the_rule_draws_and_says_so_without_pictures(name, data, records):
    opened = open_dataset(name, data)
    assert len(read_subset(name).files) == len(opened) == COUNTS[name]
    for episodes in (6, 4):
        drawn = draw('balanced', opened, 5, 0, episodes)
        listed = subset_manifests(name, data, episodes)
        for k in (1, 5): assert drawn.first(k).hash == listed[k].hash == manifest_hash(name, episodes, k)

@pytest.mark.parametrize('what,said', [('changed', r'masks/3\.png: sha256 [0-9a-f]{8}, expected [0-9a-f]{8}: .* subset: 7 images, 1 class.*restore the file$'),
                                       ('lost', r'CXR_png/2\.png: missing'), ('more', r'CXR_png/new\.png: not among the files')])
def test_other_pictures_are_named_in_one_line(what, said, tmp_path, records):
    root = made_up(tmp_path)
    lungs = root/'LungSegmentation'
    if what == 'changed': blob(lungs/'masks/3.png', 5)
    for folder in ('CXR_png', 'masks'):
        if what == 'lost': (lungs/folder/'2.png').unlink()
        if what == 'more': blob(lungs/folder/'new.png', 5)
    with pytest.raises(InputError, match=said) as e: check_subset('chest', root)
    assert '\n' not in str(e.value)
    with pytest.raises(InputError): real.check_data(RealOptions(data=str(root)), say=lambda line: None)
    assert check_subset('isic', root).name == 'isic'

def test_what_is_no_target_has_no_episodes_and_lists_end(data, records):
    with pytest.raises(InputError, match='a source, without'): subset_manifests('voc', data)
    with pytest.raises(InputError, match='lists 6'): subset_manifests('isic', data, 7)
    with pytest.raises(InputError, match='unknown subset'): read_subset('nothing')

def test_the_plan(data, tmp_path):
    o = RealOptions(data=str(data), setting='smoke', seeds='0,1')
    jobs = plan(o)
    names = [j.name for j in jobs]
    assert len(set(names)) == len(names) and all(not j.after or j.after in names[:k] for k, j in enumerate(jobs))
    assert {j.settings['protocol'] for j in jobs if not j.look} == {'subset'} and NEAR not in next(j for j in jobs if j.name == 'ifa, seed 0').settings['targets']
    small = [j for j in jobs if j.name.startswith('ssp+apm')]
    assert all(j.settings['epochs'] == 0 and j.after.startswith('ssp+lcm') for j in small)
    assert all(j.name.endswith(('0', '1')) for j in plan(dataclasses.replace(o, parts='core')))
    for change_, said in ((dict(parts='core,nothing'), 'unknown part'), (dict(data=None), 'no such folder'), (dict(setting='reduced'), r'resnet18_in1k.*no such file'), (dict(seeds='x'), 'whole numbers')):
        with pytest.raises(InputError, match=said): plan(dataclasses.replace(o, **change_))

def workers() -> list[int]:
    "The study's workers below this process."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try: words, state = (p/'cmdline').read_text().split('\0'), (p/'stat').read_text().rsplit(')', 1)[1].split()
        except OSError: continue
        if state[1] == str(os.getpid()) and state[0] != 'Z' and 'cdfss.report.real:do' in words: found.append(int(p.name))
    return found

def kill_at_work(runs:Path):
    "Kill the worker as soon as it has begun a run."
    end = time.monotonic() + 300
    while time.monotonic() < end and not list(runs.glob('ssp+lcm-*')): time.sleep(.01)
    for pid in workers(): os.kill(pid, signal.SIGKILL)

@pytest.fixture(scope='module')
def done(data, records, tmp_path_factory):
    "SSP with LCM, and PCMT on its weights, in three calls: one that is stopped at once, one that does it though its worker is killed, one that finds it done; with a job that fails on the way."
    o, said = RealOptions(data=str(data), setting='smoke', seeds='0', runs=str(tmp_path_factory.mktemp('runs')), workers=1), [[], [], [], []]
    jobs = [j for j in plan(o) if j.name in ('ssp+lcm, seed 0', 'ssp+pcmt, seed 0')]
    work(jobs, dataclasses.replace(o, minutes=1e-9), said[0].append)
    killer = threading.Thread(target=kill_at_work, args=(Path(o.runs),), daemon=True)
    killer.start()
    work(jobs, o, said[1].append)
    work(jobs, o, said[2].append)
    broken = Job('broken, seed 0', jobs[0].settings | dict(lr=-1.))
    with pytest.raises(InputError, match=r'2 of 4 jobs failed; the first \(broken, seed 0\): lr') as e: work([broken, Job('after it, seed 0', jobs[1].settings, 'broken, seed 0'), *jobs], o, said[3].append)
    return o, said, str(e.value)

def test_a_study_is_stopped_and_goes_on_and_is_not_done_twice(done):
    o, said, _ = done
    assert said[0] == ['2 of 2 jobs are left after 1e-09 minutes: run the same command again']
    assert said[1].pop(0) == 'ssp+lcm, seed 0  its process was ended by SIGKILL (by hand, or for want of memory); start 2 of 3 follows'
    assert [l.split('  ')[:2] for l in said[1]] == [['1/2', 'ssp+lcm, seed 0'], ['2/2', 'ssp+pcmt, seed 0']] and not workers()
    assert said[2] == ['2 of 2 jobs were done before']
    first, second = (Progress(o).done[n] for n in ('ssp+lcm, seed 0', 'ssp+pcmt, seed 0'))
    assert first['seconds'] > 0 and second['run'].startswith('ssp+pcmt-')

def test_a_job_that_fails_takes_only_what_needs_it_along(done):
    o, said, error = done
    assert '\n' not in error and set(Progress(o).done) == {'ssp+lcm, seed 0', 'ssp+pcmt, seed 0'}
    assert said[3][0] == '2 of 4 jobs were done before' and said[3][1].startswith('3/4  broken, seed 0  ') and '  FAILED: lr' in said[3][1] and said[3][2] == "4/4  after it, seed 0  0 s  FAILED: 'broken, seed 0' failed"

def test_what_a_job_takes_from_the_one_before_it(done):
    o, job = done[0], plan(done[0])[0]
    weights = Progress(o).run(job).path
    score, look = Job('score, seed 0', dict(method='lcm', epochs=0), job.name), Job('look at it, seed 0', after=job.name, look=dict(sharpness=dict(kinds=('feature',), episodes=4)), recipe='ssp')
    grid = real.cells_of([look, score, job], Progress(o))
    assert [c.status for c in grid.values()] == ['waiting', 'waiting', 'done'] and all(c.ready for c in grid.values())
    assert grid[score.name].given() == dict(settings=score.settings | dict(checkpoint=str(weights))) and 'checkpoint' not in score.settings
    assert grid[look.name].given() == dict(look=look.look, recipe='ssp', run=str(weights))
    assert not real.cells_of([job, score], Progress(dataclasses.replace(o, runs='nowhere')))[score.name].ready
    with pytest.raises(InputError, match="score, seed 0: takes the weights of 'ssp[+]lcm, seed 0', which is not in the plan"): work([score], o)
    with pytest.raises(InputError, match='address=auto: only engine=ray'): work([job], dataclasses.replace(o, address='auto'))

def test_a_look_is_asked_as_the_plan_says_it(monkeypatch):
    asked = []
    monkeypatch.setattr(real, 'diagnose', lambda run, name, recipe, **options: asked.append((run.path.name, name, recipe, options)))
    job = Job('look', look=dict(sharpness=dict(episodes=4, kinds=('feature',), strengths=(.5, 1.)), cka=dict(episodes=4)))
    assert real.do(json.loads(json.dumps(dict(run='runs/a-1', look=job.look, recipe='')))) == 'runs/a-1'
    assert asked == [('a-1', 'sharpness', None, job.look['sharpness']), ('a-1', 'cka', None, job.look['cka'])]

def test_a_list_of_finished_jobs_stays_valid(tmp_path):
    "What was asked of a job is known by a hash that every finished study has kept."
    job = Job('ssp+pcmt, seed 0', dict(method='ssp+pcmt', seed=0, epochs=0, lr=1e-4, data_root='here', runs='there', weights='w', device='cpu'), 'ssp+lcm, seed 0')
    look = Job('look at ssp, seed 0', after='ssp+lcm, seed 0', recipe='ssp', look=dict(sharpness=dict(episodes=12, kinds=('feature',), strengths=(.5, 1.))))
    assert [Progress.asked(j) for j in (job, look)] == ['06cd2811e9', 'e49656199e'] and Progress.asked(dataclasses.replace(job, settings=job.settings | dict(data_root='x', device='cuda'))) == Progress.asked(job)

def test_tables_and_verdicts_from_the_records(done, tmp_path, records):
    o, said = done[0], []
    table = report(o, tmp_path/'real', say=said.append)
    results = pd.read_csv(tmp_path/'real/results.csv').set_index(['method', 'target', 'shot'])
    run = Progress(o).run(plan(o)[0])
    for r in run.metrics['results']: assert results.loc[(r['method'], r['target'], r['shot']), 'class_miou'] == pytest.approx(r['class_miou'], abs=1e-3)
    assert results.loc[('ssp+pcmt', 'isic', 1), 'change'] == pytest.approx(results.loc[('ssp+pcmt', 'isic', 1), 'class_miou'] - results.loc[('ssp', 'isic', 1), 'class_miou'], abs=2e-3)
    assert results.loc[('ssp', 'isic', 5), 'manifest'] == manifest_hash('isic', 3, 5)[:8]
    text = (tmp_path/'real/runs.txt').read_text()
    assert 'subset: 18 images, 3 classes' in text and 'commit' in text and str(o.data) not in text
    assert (table.real[table.source != 'loec.md, claim a'] == 'cannot tell').all() and table.value[table.claim.str.startswith('LCM gains (')].notna().all()       # one seed has no interval over seeds
    assert 'LoEC: LCM gains (+2.57)' in claims_text(table) and not list((tmp_path/'real').glob('predictions*'))
    real.tell(real.ClaimOptions(runs=str(tmp_path/'none'), figures=str(tmp_path/'real')), said.append)
    assert 'not there; the verdicts are those of' in said[-1]
    with pytest.raises(InputError, match='no study there'): real.tell(real.ClaimOptions(runs=str(tmp_path/'none'), figures=str(tmp_path)))

def test_a_run_on_other_episodes_is_refused(done, monkeypatch):
    runs = real.finished(done[0])
    monkeypatch.setattr(real, 'manifest_hash', lambda *a: 'other')
    with pytest.raises(InputError, match='are not the first 3 of the subset'): real.check_lists(runs.values())
    with pytest.raises(InputError, match='no finished run'): real.finished(RealOptions(runs='nowhere'))

def frame(level, seeds=(0, 1, 2)):
    "Made-up counts: `level(label, target, seed)` percent, and what was tuned on each task on two of four episodes."
    rows = [dict(backbone='b', label=l, seed=s, run='r', target=t, shot=1, index=i, query=f'q{i}', cls=0, tp=10*level(l, t, s), fp=1000 - 10*level(l, t, s), fn=0, tn=0)
            for l in ('ssp', 'ssp+lcm', 'ssp+apm_m') for t in TARGETS for s in seeds for i in range(2 if 'apm' in l else 4)]
    return pd.DataFrame(rows)

def test_changes_are_paired_by_seed_and_by_episode(records):
    f = frame(lambda l, t, s: 40 + s + 3*('lcm' in l) + 2*('apm' in l)*(t != NEAR))
    t = score_table(f, 4).set_index(['method', 'target'])
    assert t.loc[('ssp+lcm', 'far'), ['change', 'change_low', 'change_high']].tolist() == pytest.approx([3, 3, 3]) and ('ssp+apm_m', 'far') not in t.index
    assert t.loc[('ssp', 'isic'), 'class_miou'] == pytest.approx(41) and np.isnan(t.loc[('ssp', 'isic'), 'change'])
    assert real.lists(f) == [4, 2]
    short = score_table(real._beside(f, 2), 2).set_index(['method', 'target'])
    assert short.loc[('ssp+apm_m', 'far'), 'change'] == pytest.approx(2) and short.loc[('ssp+apm_m', NEAR), 'change'] == pytest.approx(0)
    assert change(f, 'ssp+apm_m', 'ssp', TARGETS, 1).tolist() == pytest.approx([1.6]*3)
    with pytest.raises(InputError, match='no run of hsl'): change(f, 'hsl', 'ssp', TARGETS, 1)

@pytest.fixture
def shipped(monkeypatch): monkeypatch.setattr(subsets, 'ASSETS', ROOT/'cdfss'/'assets')

@pytest.mark.real
def test_the_shipped_records_are_of_the_pictures_beside_the_checkout(real_data, shipped):
    assert subset_names() == sorted((SOURCE, *TARGETS))
    for name in (SOURCE, *TARGETS): check_subset(name, real_data)
    for name in TARGETS:
        drawn = draw('balanced', open_dataset(name, real_data), 5, 0, 60)
        assert {k: drawn.first(k).hash for k in (1, 5)} == {k: manifest_hash(name, 60, k) for k in (1, 5)}

def test_the_shipped_records_list_no_pictures_twice_and_their_hashes_hold(shipped):
    for name in TARGETS:
        s = read_subset(name)
        assert len(s.episodes) == 200 and {k: manifest_hash(name, 200, int(k)) for k in s.manifests} == s.manifests

# ---- as a user runs it ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_both_notebooks_to_their_end(data, records, tmp_path):
    "On made-up pictures, with their records in a copy of the package."
    shutil.copytree(ROOT/'cdfss', tmp_path/'code'/'cdfss', ignore=shutil.ignore_patterns('__pycache__'))
    for f in records.iterdir(): shutil.copy(f, tmp_path/'code'/'cdfss'/'assets')
    papermill = shutil.which('papermill', path=str(Path(sys.executable).parent))
    def execute(name, **given):
        r = subprocess.run([papermill, str(ROOT/'nbs'/f'{name}.ipynb'), f'{name}.ipynb', *(a for k, v in given.items() for a in ('-p', k, str(v)))], cwd=tmp_path, capture_output=True, text=True, timeout=1200,
                           env=os.environ | dict(PYTHONPATH=str(tmp_path/'code')))
        assert r.returncode == 0, r.stderr[-3000:]
        outputs = [o for c in json.loads((tmp_path/f'{name}.ipynb').read_text())['cells'] if c['cell_type'] == 'code' for o in c['outputs']]
        assert {o['output_type'] for o in outputs} <= {'stream', 'display_data'} and not [o for o in outputs if o.get('name') == 'stderr'], 'a user sees lines of text, and no warnings'
        return ''.join(''.join(o.get('text', '')) for o in outputs)
    said = execute('real', data=data, setting='smoke', seeds=0, parts='core', workers=1, runs='runs')
    assert 'cracks: subset: 7 images, 1 class, all files as listed\n1/8  ssp+lcm, seed 0  ' in said and said.count('\n') == 6 + 8, said
    (tmp_path/'figures').mkdir()
    (tmp_path/'figures'/'README.md.in').write_text(''.join(f'## {h}\n\n' for h in SECTIONS) + 'PCMT: {change: ssp+pcmt, far, 1}.\n')
    told = execute('claims', runs='runs', setting='smoke', figures='figures', miniature=ROOT/'figures')
    assert 'LoEC: LCM gains (+2.57)\n    miniature  ' in told and told.splitlines()[-1].startswith('real: ')
    assert set(pd.read_csv(tmp_path/'figures'/'seconds.csv').commit) == {'unknown'} and 'commit unknown' in (tmp_path/'figures'/'runs.txt').read_text()       # a package beside no checkout
    assert '(one seed).' in (tmp_path/'figures'/'README.md').read_text() and len(pd.read_csv(tmp_path/'figures'/'results.csv')) > 20

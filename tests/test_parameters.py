"Parameters: what a notebook or a shell gives is checked before anything is computed, and the run's name covers what decides the numbers."
import dataclasses
import pytest, torch
from cdfss.basics import InputError, Options, check_option, from_text, option
from cdfss.__main__ import given as said
from cdfss.engine import train as train_module
from cdfss.engine.runs import injected, one_line_errors, parameters_cell, read_parameters, run_hash
from cdfss.engine.train import SECTIONS, TrainSettings, numbers, open_run, prepare, resolve
from cdfss.methods.seams import method_options, used_options
from cdfss.report.sweeps import FIXED, SweepOptions, values_of

pytestmark = pytest.mark.usefixtures('one_thread')
DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainSettings)}

def line(error) -> str:
    "The message, which must be one line that a reader can act on."
    text = str(error.value)
    assert '\n' not in text and 10 < len(text) < 700
    return text

# ---- what papermill injects -------------------------------------------------------------------------------------------------
def cell(**given): return '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in given.items())

def read(**given): return read_parameters(TrainSettings, {**DEFAULTS, **given, 'other': 3}, ['', 'method = 1', cell(**given), 'x = 2'])

def test_injected_names_are_found():
    assert injected([]) == injected(['a = 1', 'import os']) == set()
    assert injected(['x = 1', cell(epochs=3, runs='a b')]) == {'epochs', 'runs'}
    assert injected([cell(a=1), cell(b=1)]) == {'b'}                        # a cell run twice: the last stands

def test_defaults_are_the_settings():
    assert read() == TrainSettings() and read(epochs=3).epochs == 3 and read(lcm_beta=.8).lcm_beta == .8
    assert read_parameters(TrainSettings, {}) == TrainSettings()

def test_the_parameters_cell_says_the_defaults():
    text = parameters_cell(TrainSettings, SECTIONS)
    space = {}
    exec(text, space)
    assert {k: v for k, v in space.items() if not k.startswith('__')} == DEFAULTS
    assert read_parameters(TrainSettings, space) == TrainSettings()
    for f in dataclasses.fields(TrainSettings):
        row = next(l for l in text.split('\n') if l.startswith(f'{f.name}: '))
        assert f.metadata['help'] in row and all(str(c) in row for c in f.metadata['choices'] or ())

@pytest.mark.parametrize('given,reason', [
    (dict(methd='lcm'), "unknown parameter 'methd': did you mean 'method'?"),
    (dict(epoch=2), "unknown parameter 'epoch': did you mean 'epochs'?"),
    (dict(lcm_bta=1), "unknown parameter 'lcm_bta': did you mean 'lcm_beta'?"),
    (dict(epochs='two'), "epochs='two' is str, expected int | None (default None)"),
    (dict(epochs=1.5), "epochs=1.5 is float, expected int | None (default None)"),
    (dict(epochs=True), 'epochs=True is bool'),
    (dict(epochs=-1), 'epochs=-1: expected at least 0'),
    (dict(batch=0), 'batch=0: expected at least 1'),
    (dict(fit_shot=None), 'fit_shot=None is NoneType, expected int (default 1)'),
    (dict(momentum=1.5), 'momentum=1.5: expected at most 1'),
    (dict(lr=float('nan')), 'lr=nan: expected a finite number'),
    (dict(lr='1e-3'), "lr='1e-3' is str"),
    (dict(seed=2**32), 'seed=4294967296: expected at most 4294967295'),
    (dict(size=16), 'size=16: expected at least 32'),
    (dict(compare='yes'), "compare='yes' is str, expected bool (default True)"),
    (dict(compare=1), 'compare=1 is int, expected bool'),
    (dict(last_relu='False'), "last_relu='False' is str, expected bool"),
    (dict(method=['lcm']), "method=['lcm'] is list, expected str"),
    (dict(method=None), 'method=None is NoneType, expected str'),
    (dict(targets=['isic']), 'is list, expected str'),
    (dict(schedule='stepp'), "unknown value of schedule 'stepp': did you mean 'step'?"),
    (dict(output_stride=4), 'output_stride=4: choose from 8, 16, 32'),
    (dict(protocol='PATNet'), "did you mean 'patnet'?"),
    (dict(lcm_beta_rule='median'), "unknown value of lcm_beta_rule 'median'"),
    (dict(lem_p=-.1), 'lem_p=-0.1: expected at least 0')])
def test_bad_values_are_named(given, reason):
    with pytest.raises(InputError) as e: read(**given)
    assert reason in line(e)

def test_numbers_where_words_are_expected_and_the_reverse():
    assert read(shots=1).shots == '1' and read(track=3).track == '3'          # `-p shots 1` is a number in the shell's eyes
    s = read(lr=1, momentum=0)
    assert s.lr == 1 and s.momentum == 0.0 and isinstance(s.momentum, float)
    assert TrainSettings(momentum=1) == TrainSettings(momentum=1.0)

@pytest.mark.parametrize('kind', [TrainSettings, SweepOptions], ids=lambda kind: kind.__name__)
def test_every_default_is_read_back_from_text(kind):
    for f in dataclasses.fields(kind): assert from_text(f, str(f.default)) == f.default, f.name

@pytest.mark.parametrize('name,text,value', [('epochs', '3', 3), ('epochs', 'None', None), ('lr', '1e-3', .001), ('lr', '2', 2.), ('shots', '5', '5'), ('shots', '1,5', '1,5'), ('compare', 'FALSE', False), ('nest', 'True', True), ('nest', 'false', False), ('nest', 'None', None),
                                             ('method', 'None', 'None'), ('data_root', 'None', None), ('data_root', '007', '007'), ('fold', '0', 0)])
def test_text_becomes_what_its_parameter_means(name, text, value):
    "Of the command and of a sweep alike."
    assert getattr(said([f'{name}={text}'], TrainSettings), name) == value and (name in FIXED or values_of(f'{name}=[{text}]', 'settings') == (name, [value]))
    assert type(getattr(said([f'{name}={text}'], TrainSettings), name)) is type(value)

@pytest.mark.parametrize('name,text', [('epochs', '1.0'), ('epochs', 'two'), ('epochs', ''), ('epochs', '-1'), ('epochs', '9'*30), ('lr', 'nan'), ('lr', 'None!'), ('compare', 'yes'), ('compare', '1'), ('seed', 'None'), ('fold', '4'), ('shots', 'a\0')])
def test_text_that_its_parameter_cannot_mean(name, text):
    with pytest.raises(InputError, match=name) as e: said([f'{name}={text}'], TrainSettings)
    line(e)

def test_check_option_alone():
    @dataclasses.dataclass(frozen=True)
    class Some(Options):
        a:int = option(1, 'a number', low=0)
        b:str|None = option(None, 'a word or nothing')
        c:float = option(.5, 'a share', low=0, high=1)
    a, b, c = dataclasses.fields(Some)
    assert check_option(a, 0) == 0 and check_option(b, None) is None and check_option(b, 3) == '3' and check_option(c, 1) == 1.0
    for f, v in ((a, 1.0), (a, None), (a, -1), (b, True), (c, 1.01), (c, float('inf')), (c, True)):
        with pytest.raises(InputError): check_option(f, v)
    with pytest.raises(InputError, match="unknown parameter 'x_d'"): Some.make({'d': 1}, 'x_')
    with pytest.raises(InputError, match='x_a=-1'): Some.make({'a': -1}, 'x_')

def test_one_line_errors_end_the_program_with_the_line():
    with pytest.raises(SystemExit) as e:
        with one_line_errors(): raise InputError('epochs=two: no')
    assert e.value.code == 'error: epochs=two: no' and e.value.__suppress_context__
    with pytest.raises(ZeroDivisionError):                                    # a fault of ours keeps its traceback
        with one_line_errors(): 1/0

# ---- what can not work ------------------------------------------------------------------------------------------------------
def given(**kw): return TrainSettings(**dict(weights='none') | kw)

@pytest.mark.parametrize('kw,reason', [
    (dict(method='sspp'), "unknown method 'sspp': did you mean 'ssp'?"), (dict(method='ssp+lmc'), "unknown module 'lmc': did you mean 'lcm'?"),
    (dict(data_root='nowhere'), 'data_root=nowhere: no such folder'), (dict(data_root=__file__), 'no such folder'),
    (dict(weights='nofile.pth'), 'weights=nofile.pth: no such file'), (dict(weights='HUB'), 'weights=HUB: no such file'),
    (dict(source='vox'), "unknown data set 'vox': did you mean 'voc'?"), (dict(targets='isic,chst'), "unknown data set 'chst': did you mean 'chest'?"),
    (dict(targets=''), "targets='': name at least one data set"), (dict(targets=' , '), 'name at least one data set'),
    (dict(targets='isic,voc'), "the source 'voc' is among the targets"), (dict(source='isic', targets='chest,ISIC'), "the source 'isic' is among the targets"),
    (dict(shots='0'), "shots='0': expected"), (dict(shots='one'), "shots='one'"), (dict(shots=''), "shots=''"), (dict(shots='1;5'), "shots='1;5'"),
    (dict(track='some'), "track='some'"), (dict(device='gpu'), 'device=gpu: choose from auto, cpu, cuda')])
def test_impossible_settings_are_refused(kw, reason):
    with pytest.raises(InputError) as e: resolve(given(**kw))
    assert reason in line(e)

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_gpu_that_is_not_there():
    with pytest.raises(InputError, match='device=cuda: torch sees no GPU here'): resolve(given(device='cuda'))

@pytest.mark.parametrize('text,found', [('1', (1,)), ('1,5', (1, 5)), ('[1,5]', (1, 5)), ('(1, 5)', (1, 5)), ('5,1,5', (5, 1)), ('1,', (1,))])
def test_shots(text, found):
    assert numbers(text, 'shots') == found
    resolve(given(shots=text))

def test_resolve_leaves_nothing_open(tmp_path):
    s, real = resolve(given(method='loec')), resolve(given(data_root=str(tmp_path)))
    for settings, scale in ((s, 'miniature'), (real, 'real')):
        assert all(getattr(settings, k) == v for k, v in train_module.SCALES[scale].items()) and resolve(settings) == settings
        assert settings.device == ('cuda' if torch.cuda.is_available() else 'cpu') and settings.lr > 0
    assert (s.method, s.freeze, s.backbone) == ('ssp+lem+lcm', 'none', 'miniature') and (real.freeze, real.backbone) == ('stem+stage1', 'resnet50')
    assert resolve(given(epochs=0, size=64)).epochs == 0 and resolve(given(size=64)).size == 64

# ---- data faults through prepare --------------------------------------------------------------------------------------------
def on(root, tmp, **kw):
    return given(**dict(data_root=str(root), backbone='miniature', size=32, epochs=1, lr=.003, fit_episodes=8, targets='isic', shots='1', test_episodes=6,
                        track_episodes=6, runs=str(tmp/'runs')) | kw)

@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('CDFSS_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield

def test_data_that_is_not_there(miniature, tmp_path, cache):
    for kw, reason in ((dict(targets='deepglobe'), "data set 'deepglobe'"), (dict(source='kvasir'), "data set 'kvasir'"), (dict(shots='20'), '20-shot episodes')):
        with pytest.raises(InputError) as e: prepare(resolve(on(miniature, tmp_path, **kw)))
        assert reason in line(e)

# ---- the run's name ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def base(miniature, tmp_path_factory, cache):
    s = resolve(on(miniature, tmp_path_factory.mktemp('runs')))
    return s, prepare(s)

def name(s, data, **kw): return open_run(resolve(dataclasses.replace(s, **kw)), data).path.name

def test_where_and_how_fast_do_not_change_the_name(base, tmp_path, miniature):
    s, data = base
    own = name(s, data)
    assert own.startswith('ssp+lcm-') and own == name(s, data) == name(s, data, method='lcm')
    (tmp_path/'link').symlink_to(miniature)
    for kw in (dict(runs='elsewhere'), dict(workers=3), dict(data_root=str(tmp_path/'link')), dict(device='cpu'), dict(shots='[1]'), dict(targets=' ISIC,isic')): assert name(s, data, **kw) == own, kw
    moved = resolve(dataclasses.replace(s, data_root=str(tmp_path/'link')))
    assert open_run(moved, prepare(moved)).path.name == own

def test_everything_else_changes_the_name(base):
    s, data = base
    other = dict(method='ssp', seed=1, source='chest', targets='chest', size=64, on_error='skip', min_area=2, shots='5', protocol='balanced', test_seed=1, test_episodes=7,
                 track='none', track_episodes=7, compare=False, samples=1, epochs=2, fit_episodes=9, batch=4, fit_shot=2, lr=.1, schedule='poly', momentum=.5,
                 weight_decay=0.0, border='background', precision='bf16', backbone='resnet18', last_stage='stage2', output_stride=16, last_relu=True, pixels='half',
                 freeze='stem', bn='eval', guard=False, optimizer='adam', keep_epochs=True, eval_size='native', augment='hsl')
    tuning = dict(adapt_steps=3, adapt_lr=.5, adapt_optimizer='sgd')
    skipped = {*train_module.NOT_HASHED, *method_options(), *tuning, 'fold'}                       # of a fold: tests/test_folds.py
    assert set(other) == {f.name for f in dataclasses.fields(TrainSettings)} - skipped, 'a new parameter: say here how it changes the name'
    names = {k: name(s, data, **{k: v}) for k, v in other.items()}
    assert len({*names.values(), name(s, data)}) == len(names) + 1
    assert {name(s, data, **{k: v}) for k, v in tuning.items()} == {name(s, data)}, 'nothing is tuned in this recipe'
    assert len({name(s, data, method='ssp+apm_m', **{k: v}) for k, v in (*tuning.items(), ('seed', 0))}) == 4

def test_options_count_where_their_method_is_used(base):
    s, data = base
    plain, lcm = name(s, data, method='ssp'), name(s, data)
    for f, field in method_options().items():
        v = field.default
        new = not v if isinstance(v, bool) else next(c for c in field.metadata['choices'] if c != v) if field.metadata['choices'] else \
            'stage1' if isinstance(v, str) else {int | None: 64, str | None: 'there'}.get(field.type, .5) if v is None else v + 1 if isinstance(v, int) else v/2
        assert (name(s, data, method='ssp', **{f: new}) != plain) == (f in used_options('ssp')), f
        assert (name(s, data, **{f: new}) != lcm) == (f in used_options('lcm')), f
    assert {'ssp_refine', 'lcm_k'} <= {*used_options('lcm')} and 'lcm_k' not in used_options('ssp')

def test_weights_count_by_content(base, tmp_path):
    s, data = base
    for n, content in (('a', b'1'), ('b', b'1'), ('c', b'2')): (tmp_path/f'{n}.pth').write_bytes(content)
    a, b, c = (name(s, data, weights=str(tmp_path/f'{n}.pth')) for n in 'abc')
    assert a == b and len({a, c, name(s, data)}) == 3

def test_data_count_by_content(base, miniature, tmp_path):
    import shutil
    s, data = base
    copy = shutil.copytree(miniature, tmp_path/'copy')
    same = resolve(dataclasses.replace(s, data_root=str(copy)))
    assert open_run(same, prepare(same)).path.name == name(s, data)
    used = data.manifests['isic', 1].ids[0][0]
    shutil.copy(next(p for p in (copy/used).parent.iterdir() if p.name != (copy/used).name), copy/used)
    assert open_run(same, prepare(same)).path.name != name(s, data)

def test_hash_does_not_depend_on_order(): assert run_hash(dict(a=1, b=[1, 2])) == run_hash(dict(b=[1, 2], a=1)) != run_hash(dict(a=1, b=[2, 1]))

"A data set, an archive or a checkpoint of a stranger is read, and nothing in it is run: no pickle, no shell, no link out of a folder, no HTML."
import ast, io, json, os, pickle, re, struct, subprocess, tarfile, time, zipfile
from pathlib import Path
import numpy as np
import pandas as pd
import pytest, torch
from PIL import Image
from safetensors.torch import save
from cdfss.basics import InputError
from cdfss.data import archives
from cdfss.data.images import ImageStore, _open
from cdfss.data.layouts import index_areas, open_dataset
from cdfss.engine.runs import Run, load_state_file
from cdfss.engine.train import EvaluateSettings, TrainSettings, evaluation, load_segmenter, resolve, segmenter_of
from cdfss.models.affinity import read_predictor
from cdfss.models.backbones import BackboneOptions, create_backbone, read_state
from cdfss.report import plots, tables
from cdfss.use.pictures import read_picture
from cdfss.use.segment import FewShot, load as fewshot
from fakes import blob, picture, polyps
from test_checkpoints import Trap
from test_fuzz import fares
from test_prepare import special, tarred, zipped

NASTY = '<img src=x onerror=alert(1)>'

def refused(call, *a, **kw) -> str:
    "The one line of an `InputError`."
    with pytest.raises(InputError) as e: call(*a, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)

# ---- what the code may not do -------------------------------------------------------------------------------------------------------
def forbidden(source:str) -> list[str]:
    "Ways to a shell, to pickles and to code out of text in a piece of Python; of Image.open without the formats it may meet."
    found = []
    for line in source.splitlines():
        if re.match(r'\s*(!|%%(bash|sh|script|system)|%(sx|system|run))', line): found.append(f'a shell line: {line}')
    tree = ast.parse(re.sub(r'^(\s*)[!%].*$', r'\1pass', source, flags=re.M))
    name = lambda f: f'{name(f.value)}.{f.attr}' if isinstance(f, ast.Attribute) else getattr(f, 'id', '')
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, 'module', None) or '']
            if {'pickle', 'cPickle', 'dill', 'joblib', 'shelve', 'marshal'} & {n.split('.')[0] for n in names}: found.append(f'line {node.lineno}: a pickle module')
        if not isinstance(node, ast.Call): continue
        called, words = name(node.func), {k.arg: getattr(k.value, 'value', '?') for k in node.keywords}
        if called in ('eval', 'exec', 'os.system', 'os.popen', 'subprocess.getoutput', 'subprocess.getstatusoutput', 'pd.read_pickle', 'get_ipython().system') or called.endswith('.system'): found.append(f'line {node.lineno}: {called}')
        if words.get('shell') not in (None, False): found.append(f'line {node.lineno}: {called} with a shell')
        if words.get('allow_pickle') not in (None, False): found.append(f'line {node.lineno}: {called} with pickles')
        if called == 'torch.load' and words.get('weights_only') is not True: found.append(f'line {node.lineno}: torch.load that may unpickle')
        if called == 'Image.open' and 'formats' not in words: found.append(f'line {node.lineno}: Image.open of any format')
        if called == 'rasterio.open' and 'driver' not in words: found.append(f'line {node.lineno}: rasterio.open of any format')
    return found

def test_what_is_looked_for_is_found():
    for text in ('import pickle', 'from joblib import load', 'os.system("x")', 'subprocess.run("x", shell=True)', 'subprocess.run(x, shell=flag)', 'np.load(p, allow_pickle=True)', 'torch.load(p)',
                 'torch.load(p, weights_only=False)', 'eval(x)', 'exec(x)', '!ls', 'if x:\n    !ls {x}', '%%bash\nls', 'Image.open(p)', 'rasterio.open(p)', 'pd.read_pickle(p)', 'get_ipython().system(x)'):
        assert forbidden(text), text
    for text in ('net.eval()', 'subprocess.run(["git", x])', 'torch.load(p, weights_only=True)', 'np.load(p)', '%matplotlib inline', 'np.load(p, allow_pickle=False)', 'a = b != c'): assert not forbidden(text), text

def test_no_code_unpickles_or_builds_a_shell(repo):
    for path in [*(repo/'cdfss').rglob('*.py'), *(repo/'benchmarks').glob('*.py')]: assert not forbidden(path.read_text()), path
    for path in (p for p in (repo/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts):
        for cell in json.loads(path.read_text())['cells']:
            if cell['cell_type'] == 'code': assert not [f for f in forbidden(''.join(cell['source'])) if not f.endswith((': exec', 'any format'))], (path, cell['id'])

def test_parameters_reach_no_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CDFSS_CACHE', str(tmp_path/'cache'))
    started, real = [], subprocess.Popen.__init__
    def watched(self, args, *a, **kw):
        started.append((args, kw.get('shell')))
        return real(self, args, *a, **kw)
    monkeypatch.setattr(subprocess.Popen, '__init__', watched)
    monkeypatch.setattr(os, 'system', lambda command: pytest.fail(f'os.system({command!r})'))
    from campaign import VALUES, data
    from cdfss.engine.train import train
    text = '$(touch sprung);touch sprung|`touch sprung`&& touch sprung'
    run = train(TrainSettings(**VALUES | dict(data_root=str(data(tmp_path/f'data{text}')), runs=str(tmp_path/f'runs{text}'), epochs=0, samples=0)), say=lambda _: None)
    assert run.complete and text in str(run.path) and not list(tmp_path.rglob('sprung'))
    assert started and not any(shell for _, shell in started) and not any('touch' in str(args) for args, _ in started)
    for name in ('method', 'targets', 'backbone', 'weights', 'checkpoint', 'manifest', 'shots', 'track', 'protocol', 'device'):
        assert text in refused(lambda: segmenter_of(resolve(TrainSettings.make(VALUES | {'data_root': str(tmp_path/f'data{text}'), name: text})))), name
    assert not list(tmp_path.rglob('sprung')) and not any('touch' in str(args) for args, _ in started)

def test_a_grid_passes_its_settings_as_data(monkeypatch, tmp_path):
    from cdfss.engine import grid, workers
    seen, real = [], subprocess.Popen
    def watched(args, **kw):
        seen.append((args, kw))
        return real(args, **kw)
    monkeypatch.setattr(workers.subprocess, 'Popen', watched)
    monkeypatch.chdir(tmp_path)
    text = "x'; touch sprung; echo '$(touch sprung)"
    with pytest.raises(InputError, match='runs failed'): grid.run_grid([dict(method=text, device='cpu')], say=lambda _: None)
    [(args, kw)] = seen
    assert isinstance(args, list) and not kw.get('shell') and not any('sprung' in a for a in args) and not list(tmp_path.iterdir())

# ---- pickles ------------------------------------------------------------------------------------------------------------------------
def spiked(kind:str, trap, path:Path) -> Path:
    "A file of a kind with a pickle in it that makes a folder when it is opened."
    if kind == 'pt': torch.save({'state_dict': {'a': torch.zeros(1)}, 'args': trap}, path)
    elif kind == 'old pt': torch.save({'state_dict': {'a': torch.zeros(1)}, 'args': trap}, path, _use_new_zipfile_serialization=False)
    elif kind == 'pickle': path.write_bytes(pickle.dumps(trap))
    elif kind == 'npy': np.save(open(path, 'wb'), np.array([trap], object), allow_pickle=True)
    elif kind == 'npz': np.savez(open(path, 'wb'), a=np.array([trap], object))
    elif kind == 'script':
        with zipfile.ZipFile(path, 'w') as z:                                 # TorchScript and torch.package carry code beside the tensors
            z.writestr('archive/data.pkl', pickle.dumps(trap, 2)); z.writestr('archive/code/__torch__.py', 'raise SystemExit'); z.writestr('archive/constants.pkl', pickle.dumps(trap, 2)); z.writestr('archive/version', '3')
    return path

@pytest.mark.parametrize('kind', ['pt', 'old pt', 'pickle', 'npy', 'npz', 'script'])
@pytest.mark.filterwarnings('ignore')
def test_a_pickle_is_never_opened(tmp_path, kind, capsys):
    trap, folder = Trap(tmp_path/'sprung'), tmp_path/'run'
    for n, (name, read) in enumerate({'w.pth': read_state, 'w.safetensors': read_state, 'state.pt': load_state_file, 'fitted.safetensors': FewShot.load, 'samples.npz': lambda p: Run(p.parent).samples,
                                      'episodes.parquet': lambda p: Run(p.parent).episodes, 'weights.safetensors': lambda p: load_segmenter(p.parent)}.items()):
        (folder/str(n)).mkdir(parents=True)
        (folder/str(n)/'weights.json').write_text(json.dumps(dict(recipe='ssp', backbone=dict(backbone='miniature'), options={})))
        path = spiked(kind, trap, folder/str(n)/name)
        if read is load_state_file: assert read(path) is None and 'damaged' in capsys.readouterr().err
        else: assert str(path) in refused(read, path) or path.parent.name in refused(read, path)
        assert not (tmp_path/'sprung').exists(), name
    with pytest.raises(Exception): pickle.loads(pickle.dumps(Trap(tmp_path/'sprung'/'deeper')))
    pickle.loads(pickle.dumps(trap))
    assert (tmp_path/'sprung').exists(), 'the trap works'

# ---- what a checkpoint says it is -----------------------------------------------------------------------------------------------------
def described_run(folder:Path, recipe:str='ssp', **changes) -> Path:
    "A run folder with one small tensor, and a description of anything."
    folder.mkdir(parents=True)
    (folder/'weights.safetensors').write_bytes(save({'a': torch.zeros(4)}))
    whole = dict(recipe=recipe, backbone=dict(backbone='miniature'), options={}, size=32)
    (folder/'weights.json').write_text(json.dumps({k: v | changes.pop(k, {}) if isinstance(v, dict) else changes.pop(k, v) for k, v in whole.items()}))
    return folder

HUGE = [dict(backbone=dict(backbone='vit_giant_patch14_dinov2')), dict(backbone=dict(backbone='convnextv2_huge', last_stage='stem')), dict(backbone=dict(backbone='eva02_enormous_patch14_clip_224', last_stage='stem')),
        dict(backbone=dict(backbone='vit_tiny_patch16_224@8000000')), dict(backbone=dict(backbone='vit_tiny_patch16_224@8192:1', last_stage='stem'), recipe='prototype'), dict(recipe='sccan', options=dict(sccan_blocks=10**6)),
        dict(recipe='hdmnet', options=dict(hdmnet_base=10**9)), dict(recipe='hdmnet', options=dict(hdmnet_dim=8*10**6)), dict(recipe='hdmnet', options=dict(hdmnet_base=2, hdmnet_shots=10**8))]

@pytest.mark.parametrize('says', HUGE, ids=lambda says: str([v for d in says.values() if isinstance(d, dict) for v in d.values()][0]))
def test_a_checkpoint_that_describes_a_huge_network(tmp_path, says):
    "A hundred bytes of weights: refused in one line before memory or time is spent, whoever loads it."
    run, begun = described_run(tmp_path/'run', **says), time.process_time()
    for act in (lambda: load_segmenter(run), lambda: fewshot(run), lambda: evaluation(EvaluateSettings(method=says.get('recipe', 'ssp'), checkpoint=str(run))), lambda: read_predictor(str(described_run(tmp_path/'predictor', **says | dict(recipe='ssp'))))):
        said = fares(act, run, 'tensor', 'weights', *says.get('options', ()), 'backbone', megabytes=150)
        assert said is None
    assert time.process_time() - begun < 15

def test_a_fitted_file_that_describes_a_huge_network(tmp_path):
    seg = fewshot('prototype', backbone='miniature', weights='none', size=32)
    picture(tmp_path/'a.png', 1, (40, 30)); blob(tmp_path/'m.png', 1, (40, 30))
    whole = seg.fit([tmp_path/'a.png'], [tmp_path/'m.png']).save(tmp_path/'f.safetensors').read_bytes()
    n = struct.unpack('<Q', whole[:8])[0]
    def said(change):
        head = json.loads(whole[8:8 + n])
        about = json.loads(head['__metadata__']['about'])
        change(about)
        head['__metadata__']['about'] = json.dumps(about)
        (tmp_path/'f.safetensors').write_bytes(struct.pack('<Q', len(text := json.dumps(head).encode())) + text + whole[8 + n:])
        return fares(lambda: FewShot.load(tmp_path/'f.safetensors'), tmp_path/'f.safetensors', 'size', megabytes=150)
    assert said(lambda about: None) is not None
    for change in (lambda about: about['backbone'].update(backbone='vit_giant_patch14_dinov2'), lambda about: about['options'].update(size=10**6), lambda about: about.update(tasks=[[1, 'x', [0]*200_000]]),
                   lambda about: about.update(tasks=[[i, 'x', [0]] for i in range(100_000)]), lambda about: about.update(tasks=[[1, 'x', [0]]]*1000)): assert said(change) is None

def test_tensors_that_say_they_are_larger_than_their_file(tmp_path):
    "Four bytes that stand for 4 TB, as torch's format lets a tensor of no stride say; sparse ones, and ones on no device."
    wide, names = torch.zeros(1).expand(2**20, 2**20), ('a', 'kshot_rw.2.bias', 'pos_embed', 'stages.0.0.gamma')
    for bad in (wide, torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.zeros(1), (2**20, 2**20)), torch.empty(2**20, 2**20, device='meta')):
        for new in (True, False):
            torch.save({'state_dict': {n: bad for n in names}}, tmp_path/'w.pth', _use_new_zipfile_serialization=new)
            for act in (lambda: read_state(tmp_path/'w.pth'), lambda: evaluation(EvaluateSettings(method='hdmnet', checkpoint=str(tmp_path/'w.pth'))), lambda: create_backbone(BackboneOptions(backbone='resnet18', weights=str(tmp_path/'w.pth')))):
                assert fares(act, tmp_path/'w.pth', megabytes=150) is None
        torch.save(dict(model={}, optimizer={'state': [{'exp_avg': bad}]}), tmp_path/'state.pt')
        assert fares(lambda: load_state_file(tmp_path/'state.pt'), megabytes=100) is None and (tmp_path/'state.damaged').exists()
    shared = torch.arange(5000.)
    torch.save({'a': shared, 'b': shared, 'c': shared[:10].view(2, 5)}, tmp_path/'w.pth')
    assert read_state(tmp_path/'w.pth')['b'].equal(shared), 'tied tensors are no fault'
    inner = [torch.zeros(1)]
    for _ in range(40): inner = [inner]*40
    torch.save({'state_dict': {'a': torch.zeros(3)}, 'more': inner}, tmp_path/'w.pth')
    assert fares(lambda: read_state(tmp_path/'w.pth'), seconds=5)['a'].shape == (3,), 'lists of the same lists are gone through once'

def test_records_that_unpack_to_much(tmp_path):
    with zipfile.ZipFile(tmp_path/'samples.npz', 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z, z.open('a.npy', 'w', force_zip64=True) as f:
        np.lib.format.write_array_header_1_0(f, dict(descr='|u1', fortran_order=False, shape=(5 << 30,)))
        f.write(bytes(1 << 20))
    head = (tmp_path/'samples.npz').read_bytes()
    at = head.rindex(b'PK\1\2') + 24                                         # the size in the directory, which is what is believed
    (tmp_path/'samples.npz').write_bytes(head[:at] + struct.pack('<I', 2**32 - 2) + head[at + 4:])
    assert 'samples.npz' in refused(lambda: Run(tmp_path).samples)
    pd.DataFrame(dict(a=np.zeros(5_000_001, np.int8))).to_parquet(tmp_path/'episodes.parquet')
    assert (tmp_path/'episodes.parquet').stat().st_size < 1e5 and 'episodes.parquet' in refused(lambda: Run(tmp_path).episodes)

# ---- archives -------------------------------------------------------------------------------------------------------------------------
def test_a_link_leads_no_later_member_out(tmp_path):
    for name, make in (('a.tar', lambda p: tarred(p, special('d', tarfile.SYMTYPE, '.'), ('d/../../out', b'x'))), ('b.tar', lambda p: tarred(p, ('real', b'1'), special('door', tarfile.SYMTYPE, 'real'), ('door/out', b'x'))),
                       ('c.tar', lambda p: tarred(p, special('here', tarfile.LNKTYPE, '/etc/passwd')))):
        refused(archives.extract, make(tmp_path/name), tmp_path/'out')
        assert not (tmp_path/'out').exists()

def test_rights_and_owners_stay_in_the_archive(tmp_path):
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        m = tarfile.TarInfo('tool'); m.size, m.mode, m.uid = 1, 0o6777, 4242
        t.addfile(m, io.BytesIO(b'x'))
    made = (archives.extract(tmp_path/'a.tar', tmp_path/'out')/'tool').stat()
    assert made.st_mode & 0o6111 == 0 and made.st_uid == os.getuid()

def test_a_sparse_member_and_overlapping_members_meet_the_budget(tmp_path):
    sparse = tarfile.TarInfo('big'); sparse.size = 0
    head = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    head[156:157] = tarfile.GNUTYPE_SPARSE
    head[386:410] = b'%011o\0%011o\0' % (0, 0)                               # a map of nothing, and a real size of 8 GiB less one
    head[483:495] = b'%011o\0' % (8**11 - 1)
    head[148:156] = b' '*8
    head[148:156] = b'%06o\0 ' % sum(head[:512])
    (tmp_path/'s.tar').write_bytes(bytes(head) + bytes(1024))
    assert 'zip bomb' in refused(archives.extract, tmp_path/'s.tar', tmp_path/'out')
    with zipfile.ZipFile(tmp_path/'o.zip', 'w', zipfile.ZIP_DEFLATED) as z:   # fifty names for one compressed kernel
        z.writestr('0', bytes(10 << 20))
        first = z.infolist()[0]
        for n in range(1, 50):
            other = zipfile.ZipInfo(str(n))
            for slot in ('compress_type', 'CRC', 'compress_size', 'file_size', 'header_offset', 'flag_bits', 'create_system'): setattr(other, slot, getattr(first, slot))
            z.filelist.append(other)
    refused(archives.extract, tmp_path/'o.zip', tmp_path/'out')               # Python sees that the names differ; the budget would see the size
    assert not (tmp_path/'out').exists() and not list(tmp_path.glob('.out*'))

def test_an_archive_cannot_write_its_own_record(tmp_path):
    path = zipped(tmp_path/'a.zip', {archives.RECORD: b'{"files": {}}', 'a': b'1'})
    out = archives.extract(path, tmp_path/'out')
    assert set(json.loads((out/archives.RECORD).read_text())['files']) == {'a'}
    stamp = (out/'a').stat().st_ino
    archives.extract(path, tmp_path/'out')
    assert (out/'a').stat().st_ino == stamp, 'whole, and not unpacked again'

# ---- pictures and lists ---------------------------------------------------------------------------------------------------------------
def test_postscript_is_not_handed_to_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **kw: pytest.fail(f'started {a}'))
    for name in ('a.png', 'a.jpg', 'a.eps'):
        (tmp_path/name).write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(sprung) (w) file closefile\nshowpage\n')
        for read in (_open, index_areas, read_picture): assert name in refused(read, tmp_path/name)

def test_a_tiff_that_is_a_recipe_for_other_files_is_not_followed(tmp_path):
    rasterio = pytest.importorskip('rasterio')
    Image.new('L', (4, 4), 77).save(tmp_path/'secret.tif')
    (tmp_path/'a.tif').write_text(f'<VRTDataset rasterXSize="4" rasterYSize="4"><SRS>EPSG:4326</SRS><GeoTransform>0,1,0,0,0,-1</GeoTransform><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
                                  f'<SourceFilename>{tmp_path}/secret.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>')
    with rasterio.open(tmp_path/'a.tif') as f: assert f.read(1).max() == 77, 'rasterio alone would follow it'
    assert 'a.tif' in refused(read_picture, tmp_path/'a.tif')

def test_a_pipe_in_a_data_set_is_not_waited_for(tmp_path):
    polyps(tmp_path, 3)
    (tmp_path/'Kvasir-SEG/images/1.jpg').unlink()
    os.mkfifo(tmp_path/'Kvasir-SEG/images/1.jpg')
    assert '1.jpg' in refused(open_dataset, 'kvasir', tmp_path)
    assert len(open_dataset('kvasir', tmp_path, on_error='skip')) == 2

def test_a_list_leads_to_no_file_outside(tmp_path):
    picture(tmp_path/'outside'/'x.jpg'); blob(tmp_path/'outside'/'x.png')
    root = tmp_path/'root'
    for name in ('JPEGImages', 'SegmentationClassAug'): (root/'VOC2012'/name).mkdir(parents=True)
    for line in ('../../../outside/x__01', f'{tmp_path}/outside/x__01'):
        for n in range(4):
            (root/'splits/pascal/trn').mkdir(parents=True, exist_ok=True)
            (root/f'splits/pascal/trn/fold{n}.txt').write_text(line + '\n')
        refused(open_dataset, 'voc', root, 'trn')

def test_names_that_are_no_text(tmp_path):
    polyps(tmp_path, 3)
    odd = os.fsencode(tmp_path/'Kvasir-SEG/images') + b'/\xff\xfe.jpg'
    os.link(tmp_path/'Kvasir-SEG/images/1.jpg', odd)
    line = refused(open_dataset, 'kvasir', tmp_path)
    assert 'UTF-8' in line and line.encode()
    error = InputError('a\nb \x1b[31m\udcff.jpg')
    assert str(error) == r'a\nb \x1b[31m\udcff.jpg' and str(InputError('plain: ü')) == 'plain: ü'

# ---- names as text ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def named(tmp_path) -> Path:
    "FSS-1000 with a class folder that is a piece of HTML, and one that is a formula."
    for name in (NASTY.replace('/', ''), r'$\frac{a$_'):
        for n in (1, 2, 3):
            picture(tmp_path/'FSS-1000'/name/f'{n}.jpg', n); blob(tmp_path/'FSS-1000'/name/f'{n}.png', n)
    return tmp_path

def test_class_names_are_drawn_as_they_are(named, tmp_path):
    d = open_dataset('fss', named, 'all')
    assert set(d.classes) == {NASTY, r'$\frac{a$_'}
    store = ImageStore(d, 32, cache=tmp_path/'cache')
    item = lambda p: (store.image(p).permute(1, 2, 0).numpy(), store.mask(p)[0].numpy())
    fig = plots.episodes([(*item(0), *item(1)), (*item(3), *item(4))], [f'fss\n{c}' for c in d.classes])
    svg = next(p for p in plots.save(fig, tmp_path/'figure') if p.suffix == '.svg').read_text()
    assert '<img' not in svg and {t.get_text() for a in fig.axes for t in (a.title, a.yaxis.label)} >= {f'fss\n{c}' for c in d.classes}

def test_tables_escape_names():
    r = pd.DataFrame(dict(method=[NASTY], target=['isic'], shot=[1]))
    table = pd.DataFrame({NASTY + ' 1-shot': ['43.1']}, index=pd.Index([NASTY], name='method'))
    table.attrs['caption'] = f'commit {NASTY}'
    html = tables.styled(table).to_html()
    assert '<img' not in html and html.count('&lt;img') == 3 and '<img' not in table.to_html() and '<img' not in r._repr_html_()

def test_widgets_show_names_as_text(tmp_path):
    from cdfss.annotate import Board
    from cdfss.use.folder import FolderOptions
    from cdfss.use.results import Result
    folder = tmp_path/'pictures'
    picture(folder/'a.png'); os.rename(folder/'a.png', folder/f'{NASTY}.png')
    board = Board(FolderOptions(images=str(folder)))
    pixels = np.zeros((4, 4, 3), np.uint8)
    board._uploaded(dict(new=[dict(name=f'{NASTY}.png', content=b'no picture')]))
    assert '<img' not in board.note.value and '&lt;img' in board.note.value
    small = board._small(Result(np.zeros((4, 4), np.uint8), np.zeros((1, 4, 4), np.float32), {1: NASTY}, pixels, NASTY))
    assert '<img' not in small.children[0].value and '&lt;img' in small.children[0].value
    board._told(lambda: f'saved in {NASTY}')
    assert '<img' not in board.note.value
    assert not getattr(board.which, 'description_allow_html', False)

def test_the_explorer_tells_errors_as_text():
    from cdfss import explore
    panel = explore.Panel.__new__(explore.Panel)
    panel.note = explore.W.HTML()
    def fail(): raise InputError(f'no run {NASTY}')
    panel._open = fail
    panel._reopen(None)
    assert '<img' not in panel.note.value and '&lt;img' in panel.note.value

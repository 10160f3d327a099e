"""Whatever a shell, a data set or a checkpoint brings: an answer, or one line that names the file or parameter; never a traceback, a hang or memory without bound.

A short, fixed run by default; `CDFSS_FUZZ=2000 pytest tests/test_fuzz.py` tries so many random examples a test (`make fuzz ARGS=2000`). Hypothesis knows the shape of what is damaged (settings, JSON,
chunks of a PNG); `make fuzz-deep` (fuzz_atheris.py, by hand) follows the readers of bytes line by line instead, where branches hide behind single bytes that damage at random does not hit."""
import base64, hashlib, io, json, os, resource, signal, struct, warnings, zipfile, zlib
from pathlib import Path
import numpy as np
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.torch import save
from cdfss.__main__ import given as given_in
from cdfss.basics import InputError
from cdfss.data import archives, prepare
from cdfss.data.doctor import look
from cdfss.data.images import ImageStore, decode_image, decode_mask, read_mask
from cdfss.data.layouts import index_areas, open_dataset
from cdfss.data.manifests import Manifest, draw, load_manifests
from cdfss.engine.runs import Run, load_state_file, read_parameters, save_state
from cdfss.engine.train import EvaluateSettings, TrainSettings, load_segmenter, numbers, resolve, save_weights
from cdfss.methods.seams import parse_recipe
from cdfss.models.backbones import read_state
from cdfss.use.folder import FolderOptions, _boxes
from cdfss.use.pictures import read_boxes, read_labels, read_picture
from cdfss.use.segment import FewShot
from episodes import segmenter
from fakes import blob, label, picture, polyps, touch, voc
from test_prepare import tarred, zipped

MANY = int(os.environ.get('CDFSS_FUZZ', 0))
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore'), pytest.mark.timeout(max(300, 3*MANY))]

def fuzzed(**strategies):
    "A fixed handful of examples, or as many random ones as `CDFSS_FUZZ` says."
    how = settings(max_examples=MANY or 25, derandomize=not MANY, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    return lambda test: how(given(**strategies)(test))

def fares(call, *named, seconds=20, megabytes=700):
    "Calls it: an answer or an `InputError` of one line that has one of the names in it, in bounded time and memory."
    def late(*_): raise TimeoutError(f'more than {seconds} s')
    was, peak = signal.signal(signal.SIGALRM, late), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize() if Path('/proc/self/statm').exists() else None
    signal.alarm(seconds)
    try:
        if size: resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 30), hard))             # far beyond the bound: so that a failure is no disaster
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return call()
    except InputError as e:
        line = str(e)
        assert line and '\n' not in line and line.isprintable() and len(line) < 9999, line
        assert not named or any(str(InputError(n)) in line for n in named), (named, line)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, was)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) >> 10
        assert grown < megabytes, f'{grown} MB more'

# ---- strategies ----------------------------------------------------------------------------------------------------------------------
TEXT = st.one_of(st.text(max_size=30), st.sampled_from(['', '\0', 'a'*100_000, '../..', '/', '~', '1,5', '0', '-1', '1e999', 'nan', '9'*5000, '٣', 'ssp+lem', 'ssp+', '+', 'true', '\ud800', 'cuda:99', 'lcm+lcm+lcm']))
VALUE = st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from([2**63, -2**63, 10**400, -10**400]), st.floats(), TEXT, st.lists(st.integers(), max_size=3), st.dictionaries(TEXT, st.integers(), max_size=2), st.binary(max_size=4))
JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=12), st.sampled_from([2**63, 10**30, -1, '../x', '\0'])),
                    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)), max_leaves=8)

@st.composite
def edits(draw, most=6):
    "Changes of a file: what, where (a share of its length), with what."
    return draw(st.lists(st.tuples(st.sampled_from(['flip', 'cut', 'drop', 'put', 'copy', 'swap', 'number']), st.floats(0, 1), st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=most))

def edited(content:bytes, changes) -> bytes:
    b = bytearray(content)
    for kind, at, other, what in changes:
        i, j = int(at*len(b)), int(other*len(b))
        if kind == 'flip' and i < len(b): b[i] ^= what[0] or 1
        elif kind == 'cut': del b[i:]
        elif kind == 'drop': del b[i:i + what[0] + 1]
        elif kind == 'put': b[i:i] = what
        elif kind == 'copy': b[i:i] = b[j:j + 64]
        elif kind == 'swap': b[i:i + 16], b[j:j + 16] = b[j:j + 16], b[i:i + 16]
        elif kind == 'number': b[i:i + 4] = [b'\xff\xff\xff\xff', b'\x7f\xff\xff\xff', b'\0\0\0\0', b'\xff\xff\xff\x7f'][what[0] % 4]
    return bytes(b)

def changed(value, path, new):
    "A JSON value with the part that a random path leads to replaced."
    if not path or not isinstance(value, (dict, list)) or not value: return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    k = keys[path[0] % len(keys)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[k] = changed(value[k], path[1:], new)
    return copy

PATHS = st.lists(st.integers(0, 50), max_size=5)

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('CDFSS_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield tmp_path_factory.mktemp('fuzz')

# ---- parameters -------------------------------------------------------------------------------------------------------------------------
NAMES = sorted(TrainSettings.__dataclass_fields__)

@fuzzed(values=st.dictionaries(st.one_of(st.sampled_from(NAMES), TEXT), VALUE, max_size=4), kind=st.sampled_from([TrainSettings, EvaluateSettings, FolderOptions, prepare.PrepareSettings]))
def test_parameters(values, kind):
    made = fares(lambda: kind.make(values), *(k[:50] for k in values))
    if made is not None: assert all(getattr(made, k) == v or isinstance(v, (int, float, str)) for k, v in values.items())

@fuzzed(values=st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=3), more=st.lists(st.sampled_from(['x = 1', 'metod = "lcm"', 'a, b = 1, 2', 'if 1: y = 2', '']), max_size=3))
def test_the_guard_of_a_notebook(values, more): fares(lambda: read_parameters(TrainSettings, values, ['# Parameters\n' + '\n'.join(more)]))

@fuzzed(name=st.sampled_from(['method', 'targets', 'source', 'shots', 'track', 'manifest', 'backbone', 'weights', 'checkpoint', 'device', 'freeze', 'last_stage', 'data_root', 'size', 'fold']), value=st.one_of(TEXT, st.integers()))
def test_settings_are_resolved_or_refused(name, value): fares(lambda: resolve(TrainSettings.make({name: value})))

@pytest.mark.parametrize('name', ['manifest', 'weights', 'checkpoint', 'data_root', 'targets'])
def test_names_that_no_file_system_takes(name):
    for value in ('a'*300, 'a'*100_000, 'a/'*3000):
        with pytest.raises(InputError): fares(lambda: resolve(TrainSettings.make({name: value}))) or resolve(TrainSettings.make({name: value}))

@fuzzed(text=TEXT)
def test_recipes_and_lists(text):
    fares(lambda: parse_recipe(text))
    fares(lambda: numbers(text, 'shots'), 'shots')

@fuzzed(name=st.sampled_from(NAMES), text=TEXT)
def test_words_of_a_command(name, text):
    made = fares(lambda: given_in([f'{name}={text}'], TrainSettings), name)
    assert made is None or isinstance(made, TrainSettings)

# ---- pictures ---------------------------------------------------------------------------------------------------------------------------
def bytes_of(im:Image.Image, kind:str, **how) -> bytes:
    im.save(out := io.BytesIO(), kind, **how)
    return out.getvalue()

def _pictures() -> dict[str, bytes]:
    a = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
    rgb, index = Image.fromarray(a), Image.fromarray((a[..., 0] % 5).astype(np.uint8), 'P')
    index.putpalette(list(range(256))*3)
    exif = Image.Exif(); exif[0x0112] = 6
    return dict(png=bytes_of(rgb, 'PNG'), palette=bytes_of(index, 'PNG'), deep=bytes_of(Image.fromarray(a[..., 0].astype(np.uint16)*257), 'PNG'), jpg=bytes_of(rgb, 'JPEG', exif=exif), bmp=bytes_of(rgb, 'BMP'),
                tif=bytes_of(rgb, 'TIFF'), deflated=bytes_of(rgb, 'TIFF', compression='tiff_deflate'), gif=bytes_of(index, 'GIF'), webp=bytes_of(rgb, 'WEBP'))
PICTURES = _pictures()

def png_with_right_sums(content:bytes) -> bytes:
    "An edited PNG whose checksums fit again, so that what lies behind them is reached."
    out, at = content[:8], 8
    while at + 8 <= len(content):
        n = struct.unpack('>I', content[at:at + 4])[0]
        body = content[at + 4:at + 8 + n]
        out += struct.pack('>I', n) + body + struct.pack('>I', zlib.crc32(body))
        at += 12 + n
    return out

def read_everyhow(path:Path):
    for read in (lambda: decode_image(path, 16), lambda: decode_image(path, 16, True), lambda: decode_mask(path, 16, True), lambda: decode_mask(path, 16, False), lambda: read_mask(path, True), lambda: index_areas(path),
                 lambda: read_picture(path), lambda: read_labels(path, (31, 24)), lambda: prepare._read(path)): fares(read, path)
    for how in (dict(), dict(decode=True), dict(decode=True, index=True)): assert fares(lambda: look(path, **how)) is not None

@pytest.mark.parametrize('kind', PICTURES)
def test_whole_pictures_are_read(place, kind):
    "What is damaged below can be read when it is not."
    (place/'whole').write_bytes(PICTURES[kind])
    assert decode_image(place/'whole', 16)[0]['native'] == ([31, 24] if kind == 'jpg' else [24, 31]) and read_picture(place/'whole').pixels.shape[2] == 3 and look(place/'whole', decode=True).fault is None

@fuzzed(kind=st.sampled_from(sorted(PICTURES)), changes=edits(), sums=st.booleans())
def test_damaged_pictures(place, kind, changes, sums):
    content = edited(PICTURES[kind], changes)
    path = place/f"a.{'png' if kind in ('palette', 'deep') else 'tif' if kind == 'deflated' else kind}"
    path.write_bytes(png_with_right_sums(content) if sums and path.suffix == '.png' else content)
    read_everyhow(path)

@fuzzed(content=st.binary(max_size=200), name=st.sampled_from(['a.png', 'a.jpg', 'a.tif', 'a.bmp']))
def test_bytes_that_are_no_picture(place, content, name):
    (place/name).write_bytes(content)
    read_everyhow(place/name)

@pytest.mark.parametrize('side', [(60_000, 60_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_a_picture_that_says_it_is_huge(place, side):
    "A PNG of a hundred bytes that says it has 3.6 thousand million pixels; a TIFF likewise."
    chunk = lambda kind, body: struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    (place/'huge.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', *side, 8, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes(100_000))) + chunk(b'IEND', b''))
    read_everyhow(place/'huge.png')
    tags = [(256, 4, side[0]), (257, 4, side[1]), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, side[1]), (279, 4, 100)]
    (place/'huge.tif').write_bytes(b'II*\0' + struct.pack('<I', 8) + struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', t, k, 1, v) for t, k, v in tags) + bytes(4))
    read_everyhow(place/'huge.tif')

def test_compressed_text_in_a_picture_stays_small(place):
    chunk = lambda kind, body: struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    good = PICTURES['png']
    bomb = zlib.compress(bytes(100 << 20))
    for kind, head in ((b'zTXt', b'a\0\0'), (b'iCCP', b'a\0\0'), (b'iTXt', b'a\0\1\0\0\0')):
        (place/'text.png').write_bytes(good[:33] + chunk(kind, head + bomb) + good[33:])
        fares(lambda: decode_image(place/'text.png', 16), place, megabytes=50)

def test_a_georeferenced_picture_that_says_it_is_huge(place):
    rasterio = pytest.importorskip('rasterio')
    from rasterio.transform import from_origin
    with rasterio.open(place/'geo.tif', 'w', driver='GTiff', height=100_000, width=100_000, count=3, dtype='uint8', crs='EPSG:32632', transform=from_origin(0, 0, 1, 1), sparse_ok=True, tiled=True): pass
    assert (place/'geo.tif').stat().st_size < 10e6
    with pytest.raises(InputError, match='million'): read_picture(place/'geo.tif')
    fares(lambda: read_picture(place/'geo.tif'), place)

# ---- lists, annotations, boxes ----------------------------------------------------------------------------------------------------------
@fuzzed(which=st.sampled_from(['splits/pascal/trn/fold0.txt', 'VOC2012/classes.txt', 'VOC2012/ImageSets/Segmentation/trainaug.txt', 'ISIC/class_id.csv', 'splits/fss/test.txt']), content=st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda t: t.encode('utf-8', 'surrogatepass')),
        st.sampled_from([b'a__01\n/etc/passwd__02', b'../../x__01', b'a__99', b'__', b'ID,Class\na', b'a'*252, b'x\n' + b'a'*5000, b'ID,Class\n\0,b', b'\xff\xfe', b'..\n.', b'/', b'ID\n1', b'ID,Class\n' + b'a'*200_000 + b',b'])))
def test_lists_of_a_data_set(tmp_path_factory, which, content):
    root = voc(tmp_path_factory.mktemp('lists'), {'a': [1], 'b': [2], 'c': [1]})
    for n in range(4): touch(root, f'splits/pascal/trn/fold{n}.txt', text='a__01\n') if 'pascal' in which else None
    touch(root, 'FSS-1000/x/1.jpg', 'FSS-1000/x/1.png', 'ISIC/ISIC2018_Task1-2_Training_Input/a.jpg', 'ISIC/ISIC2018_Task1_Training_GroundTruth/a_segmentation.png')
    touch(root, which)
    (root/which).write_bytes(content)
    name, split = dict(spl=('voc', 'trn'), VOC=('voc', 'val0'), ISI=('isic', None))[which[:3]] if 'fss' not in which else ('fss', 'test')
    for on_error in ('stop', 'skip'): fares(lambda: open_dataset(name, root, split, on_error), root, name)

COCO = dict(images=[dict(id=1, file_name='a.jpg', height=12, width=10)], categories=[dict(id=3, name='cat'), dict(id=7, name='dog')],
            annotations=[dict(id=1, image_id=1, category_id=3, iscrowd=0, area=9, bbox=[1, 1, 4, 4], segmentation=[[1, 1, 5, 1, 5, 5, 1, 5]]),
                         dict(id=2, image_id=1, category_id=7, iscrowd=1, area=20, bbox=[0, 0, 2, 9], segmentation=dict(size=[12, 10], counts=[20, 30, 70]))])

def annotated(root:Path, value) -> list[str]:
    (root/'in'/'annotations').mkdir(parents=True, exist_ok=True)
    (root/'in'/'annotations'/'instances_val.json').write_text(value if isinstance(value, str) else json.dumps(value))
    for kind in ('binary', 'index', 'instance'): fares(lambda: prepare.prepare_coco(root/'in', root/kind, kind), 'instances_val', root)

@fuzzed(path=PATHS, new=JSON)
def test_annotations(tmp_path_factory, path, new):
    pytest.importorskip('pycocotools')
    annotated(tmp_path_factory.mktemp('coco'), changed(COCO, path, new))

@pytest.mark.parametrize('shape', [dict(size=[12, 10], counts=[2**40, 5]), dict(size=[12, 10], counts=[-5, 125]), dict(size=[12, 10], counts='~~~~~~'), dict(size=[12, 10], counts='9'*5000), dict(size=[2**31, 2**31], counts=[1]),
                                   dict(size=[12, 10], counts=[10]*500), [[0, 0, 1e9, 0, 1e9, 1e9]], [[1, 1]], [[1, 1, 'a', 2, 3, 4]], [], [[float('inf')]*6], dict(size=[12, 10], counts='n')])
def test_annotations_that_lie_to_the_decoder(tmp_path, shape):
    "What pycocotools' C code would write beyond its arrays, or allocate, for."
    pytest.importorskip('pycocotools')
    bad = changed(COCO, [2, 0, 6], shape)
    assert bad['annotations'][0]['segmentation'] == shape or shape != shape or bad != COCO
    with pytest.raises(InputError, match='instances_val'): prepare._load_coco(_written(tmp_path/'instances_val.json', bad))

@pytest.mark.parametrize('first,said', [(dict(id=None), 'no whole number'), (dict(id=2, segmentation=dict(size=[12, 10], counts=[2**40, 5])), 'run lengths')])
def test_every_annotation_is_checked(tmp_path, first, said):
    pytest.importorskip('pycocotools')
    coco = COCO | dict(annotations=[COCO['annotations'][0] | first, COCO['annotations'][1]])              # the second has the number of the first: pycocotools knows it alone by its number
    with pytest.raises(InputError, match=said): prepare._load_coco(_written(tmp_path/'instances_val.json', coco))


def _written(path:Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path

def test_good_annotations_are_read_and_compressed_lengths_too(tmp_path):
    mask = pytest.importorskip('pycocotools.mask')
    m = np.random.default_rng(0).random((12, 10)) < .4
    packed = mask.encode(np.asfortranarray(m.astype(np.uint8)))
    assert prepare._counts(packed['counts'].decode()) == mask_counts(m)
    good = changed(COCO, [2, 1, 6], dict(size=[12, 10], counts=packed['counts'].decode()))
    assert len(prepare._load_coco(_written(tmp_path/'instances_val.json', good)).anns) == 2

def mask_counts(m:np.ndarray) -> list[int]:
    flat, out, value = m.ravel(order='F'), [], False
    at = 0
    while at < flat.size:
        run = 0
        while at < flat.size and flat[at] == value: run, at = run + 1, at + 1
        out.append(run); value = not value
    return out

def test_json_that_is_deep(tmp_path):
    deep = '['*200_000
    annotated(tmp_path, deep)
    for name in ('boxes.json', 'm.json', 'metrics.json', 'weights.json'): (tmp_path/name).write_text(deep)
    fares(lambda: _boxes(FolderOptions(images=str(tmp_path), boxes=str(tmp_path/'boxes.json'))), 'boxes')
    fares(lambda: load_manifests(tmp_path/'m.json', lambda *_: None), tmp_path)
    fares(lambda: Run(tmp_path).metrics, tmp_path)
    fares(lambda: load_segmenter(tmp_path), tmp_path)

@fuzzed(value=JSON)
def test_boxes(place, value):
    (place/'boxes.json').write_text(json.dumps(value))
    picture(place/'p'/'a.jpg')
    fares(lambda: _boxes(FolderOptions(images=str(place/'p'), boxes=str(place/'boxes.json'))), 'boxes')
    if isinstance(value, list): fares(lambda: read_boxes(value, (40, 30), 'a.jpg', {1: 'cat'}), 'a.jpg')

@pytest.mark.parametrize('box', [[False, -2**63 - 1, None, None], [0, 0, 2**70, 4], [0, 0, 1e300, 4], [0, 0, float('nan'), 4], [1, 1, 4, 4, float('inf')], [1, 1, 4, 4, float('nan')], [1, 1, 4, 4, 10**30]])
def test_boxes_of_odd_numbers(box):
    with pytest.raises(InputError, match='a.jpg'): read_boxes(box, (40, 30), 'a.jpg')

# ---- manifests ----------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def dataset(tmp_path_factory): return open_dataset('kvasir', polyps(tmp_path_factory.mktemp('polyps'), 6))

@fuzzed(path=PATHS, new=JSON, honest=st.booleans())
def test_manifests(place, dataset, path, new, honest):
    value = changed(draw('balanced', dataset, 2, 0, 4).to_json(), path, new)
    if honest and isinstance(value, dict):                                   # one who can sum
        rest = {k: v for k, v in value.items() if k != 'hash'}
        value['hash'] = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(',', ':')).encode()).hexdigest()
    file = _written(place/'manifest.json', value)
    fares(lambda: Manifest.load(file, dataset), file, dataset.root)
    fares(lambda: load_manifests(file, lambda name, split: open_dataset(name, dataset.root, split)), file, dataset.root, 'data set', 'split')

@fuzzed(changes=edits())
def test_manifests_of_bytes(place, dataset, changes):
    (place/'manifest.json').write_bytes(edited(json.dumps(draw('balanced', dataset, 1, 0, 3).to_json()).encode(), changes))
    fares(lambda: Manifest.load(place/'manifest.json', dataset), place, dataset.root)

# ---- checkpoints ----------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def checkpoints(place) -> dict[str, bytes]:
    "Small files of every kind; a run folder and a fitted segmenter."
    state = {'a.weight': torch.arange(12.).view(3, 4), 'b': torch.ones(2, dtype=torch.long)}
    torch.save({'state_dict': state}, new := io.BytesIO())
    torch.save(state, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    np.savez(npz := io.BytesIO(), a=np.arange(6).reshape(2, 3))
    save_state(place/'s.pt', dict(model=state, step=1, history=[]))
    run = place/'run'
    (run).mkdir(exist_ok=True)
    seg = segmenter('prototype')
    save_weights(seg, run/'weights.safetensors')
    (run/'weights.json').write_text(json.dumps(dict(recipe='prototype', backbone=seg.backbone.options.dict() | dict(weights='none'), options={}, epoch=0, size=32)))
    return dict(safetensors=save(state), pt=new.getvalue(), old=old.getvalue(), npz=npz.getvalue(), state=(place/'s.pt').read_bytes())

@fuzzed(kind=st.sampled_from(['safetensors', 'pt', 'old', 'npz']), suffix=st.sampled_from(['.safetensors', '.pth', '.npz']), changes=edits())
def test_damaged_checkpoints(place, checkpoints, kind, suffix, changes):
    path = place/f'w{suffix}'
    path.write_bytes(edited(checkpoints[kind], changes))
    fares(lambda: read_state(path), path)
    (place/'samples.npz').write_bytes(path.read_bytes())
    fares(lambda: Run(place).samples, place)

@fuzzed(changes=edits())
def test_damaged_states(place, checkpoints, changes):
    (place/'state.pt').write_bytes(edited(checkpoints['state'], changes))
    fares(lambda: load_state_file(place/'state.pt'))

@fuzzed(path=PATHS, new=JSON)
def test_descriptions_of_weights(place, checkpoints, path, new):
    run = place/'run'
    whole = (run/'weights.json').read_text()
    try:
        (run/'weights.json').write_text(json.dumps(changed(json.loads(whole), path, new)))
        fares(lambda: load_segmenter(run), run, *json.loads(whole)['backbone'], 'backbone', 'recipe', 'method', 'module', 'base', 'parameter', megabytes=2500)
    finally: (run/'weights.json').write_text(whole)

@pytest.fixture(scope='module')
def fitted(place) -> bytes:
    seg = FewShot(*_few())
    size = (40, 30)
    picture(place/'f'/'a.png', 1, size); blob(place/'f'/'a_mask.png', 1, size)
    seg.fit([place/'f'/'a.png'], [place/'f'/'a_mask.png'])
    return seg.save(place/'fitted.safetensors').read_bytes()

def _few():
    from cdfss.use.segment import load
    seg = load('prototype', backbone='miniature', weights='none', size=32)
    return seg.segmenter, seg.recipe, seg.values, seg.options, seg.adapt

@fuzzed(path=PATHS, new=JSON, changes=edits(2), which=st.booleans())
def test_fitted_files(place, fitted, path, new, changes, which):
    file = place/'fitted.safetensors'
    n = struct.unpack('<Q', fitted[:8])[0]
    head, rest = json.loads(fitted[8:8 + n]), fitted[8 + n:]
    if which:
        about = json.loads(head['__metadata__']['about'])
        head['__metadata__']['about'] = json.dumps(changed(about, path, new))
        text = json.dumps(head).encode()
        file.write_bytes(struct.pack('<Q', len(text)) + text + rest)
    else: file.write_bytes(edited(fitted, changes))
    fares(lambda: FewShot.load(file), file, 'backbone', 'recipe', 'parameter', 'method', 'module', 'base', *head['__metadata__'], *json.loads(json.loads(fitted[8:8 + n])['__metadata__']['about'])['backbone'], megabytes=2500)

def test_a_fitted_file_of_impossible_options_is_named(place, fitted):
    n = struct.unpack('<Q', fitted[:8])[0]
    for value in (0, None, 2**63):
        head = json.loads(fitted[8:8 + n])
        about = json.loads(head['__metadata__']['about'])
        about['values']['prototype_layers'] = value
        head['__metadata__']['about'] = json.dumps(about)
        (place/'odd.safetensors').write_bytes(struct.pack('<Q', len(text := json.dumps(head).encode())) + text + fitted[8 + n:])
        with pytest.raises(InputError, match='odd.safetensors: .*layers'): FewShot.load(place/'odd.safetensors')

def test_no_flipped_byte_of_fitted_tensors_is_believed(place, fitted):
    file, n = place/'fitted.safetensors', 8 + struct.unpack('<Q', fitted[:8])[0]
    for at in np.random.default_rng(0).integers(n, len(fitted), 5):
        file.write_bytes(fitted[:at] + bytes([fitted[at] ^ 4]) + fitted[at + 1:])
        with pytest.raises(InputError, match='damaged'): FewShot.load(file)

def test_headers_that_claim_much(place):
    "Sizes of 2^60 bytes in 100 bytes of file, and a zip that unpacks to far more than it is."
    head = lambda text: struct.pack('<Q', len(text)) + text
    huge = 2**60
    tensors = dict(header=struct.pack('<Q', huge) + b'{}', tensor=head(json.dumps({'a': dict(dtype='F32', shape=[huge//4], data_offsets=[0, huge])}).encode()),
                   shape=head(json.dumps({'a': dict(dtype='F32', shape=[2**32, 2**32], data_offsets=[0, 4])}).encode()) + bytes(4), many=head(b'{' + b' '*20_000_000 + b'}'))
    for content in tensors.values():
        (place/'w.safetensors').write_bytes(content)
        for read in (read_state, FewShot.load): fares(lambda: read(place/'w.safetensors'), place, megabytes=400)
    def npy(shape): return b'\x93NUMPY\x01\0' + struct.pack('<H', len(t := f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode())) + t
    for shape in (f'({huge},)', '(100000, 100000, 100)', "(-1,)", f'({2**31}, 2)', "__import__('os')"):
        with zipfile.ZipFile(place/'samples.npz', 'w') as z: z.writestr('a.npy', npy(shape) + bytes(80))
        fares(lambda: Run(place).samples, place, megabytes=200)
    torch.save({'state_dict': {'a': torch.zeros(5_000_000)}}, whole := io.BytesIO())
    with zipfile.ZipFile(whole) as z, zipfile.ZipFile(place/'w.pth', 'w', zipfile.ZIP_DEFLATED) as packed:
        for i in z.infolist(): packed.writestr(i.filename, z.read(i))
    assert (place/'w.pth').stat().st_size < 1e6
    with pytest.raises(InputError, match='unpacks to more than its own size'): read_state(place/'w.pth')
    os.replace(place/'w.pth', place/'state.pt')
    assert fares(lambda: load_state_file(place/'state.pt'), megabytes=100) is None

# ---- archives, and the cache ----------------------------------------------------------------------------------------------------------------
@fuzzed(kind=st.sampled_from(['a.zip', 'a.tar', 'a.tar.gz', 'a.tar.xz', 'a.tar.bz2']), changes=edits())
def test_damaged_archives(tmp_path_factory, kind, changes):
    folder = tmp_path_factory.mktemp('archive')
    members = {'d/a.txt': b'1'*700, 'd/b.txt': bytes(range(256))*3}
    if kind == 'a.zip': zipped(folder/kind, members)
    else: tarred(folder/kind, *members.items(), mode={'a.tar': 'w'}.get(kind, f"w:{kind[6:]}"))
    (folder/kind).write_bytes(edited((folder/kind).read_bytes(), changes))
    out = fares(lambda: archives.extract(folder/kind, folder/'out'), kind)
    assert out is not None or not (folder/'out').exists()
    assert {p.name for p in folder.iterdir()} <= {kind, 'out'}

def test_a_record_of_zeros_is_made_again(tmp_path):
    "What a crash may leave of a file: its magic number or its length, and zeros, whose checksum is right."
    store = ImageStore(open_dataset('kvasir', polyps(tmp_path/'data', 1)), 16, cache=tmp_path/'cache', workers=1)
    store.ensure()
    image, mask = store.image(0), store.mask(0)[0]
    for keep in (0, 4, 8):
        for p in (p for p in (tmp_path/'cache').rglob('*') if p.is_file()): p.write_bytes(p.read_bytes()[:keep].ljust(p.stat().st_size, b'\0'))
        again = ImageStore(store.dataset, 16, cache=tmp_path/'cache', workers=1)
        assert again.ensure() == [] and torch.equal(again.image(0), image) and torch.equal(again.mask(0)[0], mask)

@fuzzed(changes=edits())
def test_damaged_records_of_the_cache(tmp_path_factory, changes):
    "A record that is not what was written is made again: what is read is always right."
    folder = tmp_path_factory.mktemp('records')
    d = open_dataset('kvasir', polyps(folder/'data', 2))
    store = ImageStore(d, 16, cache=folder/'cache', workers=1)
    store.ensure()
    image, mask = store.image(0), store.mask(0)[0]
    for p in sorted((folder/'cache').rglob('*')):
        if p.is_file(): p.write_bytes(edited(p.read_bytes(), changes))
    again = ImageStore(d, 16, cache=folder/'cache', workers=1)
    assert fares(again.ensure) == []
    assert torch.equal(again.image(0), image) and torch.equal(again.mask(0)[0], mask)

"Archives, hostile and whole; every preparation step against the rule written out; interruption and resume."
import io, itertools, json, os, stat, subprocess, sys, tarfile, zipfile
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from cdfss.basics import InputError
from cdfss.data import archives, prepare as P
from cdfss.data.layouts import ISIC, open_dataset

def fails(words, call, *args, **options):
    "The call raises one line that names something and holds `words`."
    with pytest.raises(InputError) as e: call(*args, **options)
    assert words in str(e.value) and '\n' not in str(e.value), str(e.value)
    return str(e.value)

def tree(folder):
    "Everything below a folder and its content, hidden files too."
    return {p.relative_to(folder).as_posix(): (os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None) for p in sorted(folder.rglob('*'))}

def shown(folder): return {n: c for n, c in tree(folder).items() if c is not None and not Path(n).name.startswith('.') and not n.startswith('.raw')}

def zipped(path, members, **options):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, **options) as z:
        for name, data in members.items(): z.writestr(name, data)
    return path

def tarred(path, *members, mode='w'):
    "Members are (name, bytes) or TarInfo."
    with tarfile.open(path, mode) as t:
        for m in members:
            if isinstance(m, tarfile.TarInfo): t.addfile(m); continue
            info = tarfile.TarInfo(m[0]); info.size = len(m[1])
            t.addfile(info, io.BytesIO(m[1]))
    return path

def special(name, kind, target=''):
    m = tarfile.TarInfo(name)
    m.type, m.linkname = kind, target
    return m

# ---- archives ---------------------------------------------------------------------------------------------------------------
GOOD = {'set/a.txt': b'a' * 1000, 'set/deep/er/b.bin': bytes(range(256)) * 20, 'set/empty': b''}

@pytest.mark.parametrize('name, mode', [('s.zip', ''), ('S.ZIP', ''), ('s.tar', 'w'), ('s.tar.gz', 'w:gz'), ('s.tgz', 'w:gz'), ('s.tar.xz', 'w:xz'), ('s.tar.bz2', 'w:bz2')])
def test_whole_archives(tmp_path, name, mode):
    path = tmp_path/name
    if not mode: zipped(path, {**GOOD, '__MACOSX/set/._a.txt': b'x'})
    else: tarred(path, *GOOD.items(), mode=mode)
    out = archives.extract(path, tmp_path/'out')
    found = tree(out)
    record = json.loads(found.pop(archives.RECORD))
    assert {n: c for n, c in found.items() if c is not None} == GOOD
    assert record['files'] == {n: dict(size=len(c), sha256=archives.hashlib.sha256(c).hexdigest()) for n, c in GOOD.items()}
    before = out.stat().st_mtime_ns, out.stat().st_ino
    assert archives.extract(path, out) == out and before == (out.stat().st_mtime_ns, out.stat().st_ino)          # nothing is done twice
    (out/'set/a.txt').unlink()
    archives.extract(path, out)                                                                                # a lost file comes back
    assert (out/'set/a.txt').read_bytes() == GOOD['set/a.txt'] and not list(tmp_path.glob('.*'))

def _zip_link(path, name, target):
    with zipfile.ZipFile(path, 'w') as z:
        info = zipfile.ZipInfo(name)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        z.writestr(info, target)
        z.writestr(f'{name}/through.txt', 'x')
    return path

def _zip_fifo(path):
    with zipfile.ZipFile(path, 'w') as z:
        info = zipfile.ZipInfo('pipe')
        info.external_attr = (stat.S_IFIFO | 0o666) << 16
        z.writestr(info, '')
    return path

def _cut(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[:keep] if keep > 0 else data[:len(data) + keep])
    return path

def _flagged(path):
    "A zip whose member says that it is encrypted."
    data = bytearray(zipped(path, {'a': b'x' * 50}).read_bytes())
    data[6] |= 1
    data[data.index(b'PK\1\2') + 8] |= 1
    path.write_bytes(data)
    return path

def _liar(path):
    "A zip whose header promises ten bytes of a long file."
    data = bytearray(zipped(path, {'a': b'x' * 5000}).read_bytes())
    at = data.index(b'PK\1\2') + 24
    data[at:at + 4] = (10).to_bytes(4, 'little')
    path.write_bytes(data)
    return path

NOISE = np.random.default_rng(0).bytes(40_000)
HOSTILE = {
    'climb.zip': ('points outside', lambda p: zipped(p, {'ok': b'x', '../out.txt': b'x'})),
    'absolute.zip': ('points outside', lambda p: zipped(p, {'/out.txt': b'x'})),
    'windows.zip': ('points outside', lambda p: zipped(p, {'a\\..\\..\\out.txt': b'x'})),
    'drive.zip': ('points outside', lambda p: zipped(p, {'C:/out.txt': b'x'})),
    'link.zip': ('points outside', lambda p: _zip_link(p, 'door', '../..')),
    'linkabsolute.zip': ('points outside', lambda p: _zip_link(p, 'door', '/etc')),
    'fifo.zip': ('no plain file', _zip_fifo),
    'encrypted.zip': ('encrypted', _flagged),
    'liar.zip': ('cut or damaged', _liar),
    'cut.zip': ('cut or damaged', lambda p: _cut(zipped(p, {'a': NOISE}), 20_000)),
    'cutend.zip': ('cut or damaged', lambda p: _cut(zipped(p, {'a': NOISE}), -10)),
    'empty.zip': ('cut or damaged', lambda p: p.write_bytes(b'')),
    'page.zip': ('cut or damaged', lambda p: p.write_text('<html>please log in</html>')),
    'bomb.zip': ('zip bomb', lambda p: zipped(p, {'zeros': bytes(40 << 20)})),
    'climb.tar': ('points outside', lambda p: tarred(p, ('a/../../out.txt', b'x'))),
    'absolute.tar': ('points outside', lambda p: tarred(p, ('/out.txt', b'x'))),
    'through.tar': ('points outside', lambda p: tarred(p, special('door', tarfile.SYMTYPE, '..'), ('door/out.txt', b'x'))),
    'absolutelink.tar': ('points outside', lambda p: tarred(p, special('door', tarfile.SYMTYPE, '/etc/passwd'))),
    'hardlink.tar': ('points outside', lambda p: tarred(p, special('door', tarfile.LNKTYPE, '../secret'))),
    'chain.tar': ('no file that came before', lambda p: tarred(p, special('a/b', tarfile.SYMTYPE, '.'), special('a/b/c', tarfile.SYMTYPE, '../..'))),
    'self.tar': ('no file that came before', lambda p: tarred(p, special('a', tarfile.SYMTYPE, 'a'))),
    'device.tar': ('no plain file', lambda p: tarred(p, special('null', tarfile.CHRTYPE))),
    'block.tar': ('no plain file', lambda p: tarred(p, special('disk', tarfile.BLKTYPE))),
    'fifo.tar': ('no plain file', lambda p: tarred(p, special('pipe', tarfile.FIFOTYPE))),
    'cut.tar': ('cut or damaged', lambda p: _cut(tarred(p, ('a', NOISE)), 20_000)),
    'cutmember.tar': ('cut or damaged', lambda p: _cut(tarred(p, ('a', bytes(512)), ('b', b'x')), 1024)),
    'cut.tar.gz': ('cut or damaged', lambda p: _cut(tarred(p, ('a', NOISE), mode='w:gz'), 20_000)),
    'cutend.tgz': ('cut or damaged', lambda p: _cut(tarred(p, ('a', NOISE), mode='w:gz'), -6)),
    'bomb.tar.gz': ('zip bomb', lambda p: tarred(p, ('zeros', bytes(40 << 20)), mode='w:gz')),
    'clash.tar': ('cannot unpack', lambda p: tarred(p, ('a', b'x'), ('a/b', b'x'))),
    'long.tar': ('cannot unpack', lambda p: tarred(p, ('x' * 300, b'x'))),
}

@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_archives_leave_nothing(tmp_path, name):
    words, make = HOSTILE[name]
    (tmp_path/'in').mkdir()
    (tmp_path/'secret').write_text('mine')
    path = tmp_path/'in'/name
    make(path)
    before = tree(tmp_path)
    assert name in fails(words, archives.extract, path, tmp_path/'in'/'deep'/'target')
    (tmp_path/'in'/'deep').rmdir()                                       # made for the target; nothing else may be in it
    assert tree(tmp_path) == before

def test_size_limit_stops_early(tmp_path):
    path = tarred(tmp_path/'s.tar', ('a', NOISE), ('b', NOISE))
    fails('max_bytes=50000', archives.extract, path, tmp_path/'out', max_bytes=50_000)
    fails('max_bytes=50000', archives.extract, zipped(tmp_path/'s.zip', {'a': NOISE, 'b': NOISE}), tmp_path/'out', max_bytes=50_000)
    archives.extract(path, tmp_path/'out', max_bytes=90_000)

def test_inner_links_become_copies(tmp_path):
    path = tarred(tmp_path/'s.tar', ('d/a', b'1'), special('d/soft', tarfile.SYMTYPE, './a'), special('hard', tarfile.LNKTYPE, 'd/a'))
    out = archives.extract(path, tmp_path/'out')
    assert [(out/n).read_bytes() for n in ('d/soft', 'hard')] == [b'1', b'1'] and not any(p.is_symlink() for p in out.rglob('*'))

def test_refuses_to_replace_what_is_not_its_own(tmp_path):
    path = zipped(tmp_path/'s.zip', GOOD)
    (tmp_path/'out').mkdir()
    (tmp_path/'out/mine.txt').write_text('x')
    fails('was not unpacked by this program', archives.extract, path, tmp_path/'out')
    archives.extract(path, tmp_path/'new')
    other = zipped(path, {'b': b'2'})
    fails('was unpacked from another', archives.extract, other, tmp_path/'new')
    fails('no such archive', archives.extract, tmp_path/'gone.zip', tmp_path/'x')
    (tmp_path/'s.rar').write_text('x')
    fails('expected one of', archives.extract, tmp_path/'s.rar', tmp_path/'x')
    fails('no stable official address', archives.fetch, 'isic', tmp_path)

def test_interrupted_extraction_starts_anew(tmp_path, monkeypatch):
    path = zipped(tmp_path/'s.zip', GOOD)
    def stop(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(archives.Budget, 'take', stop)
        with pytest.raises(KeyboardInterrupt): archives.extract(path, tmp_path/'out')
    assert sorted(os.listdir(tmp_path)) == ['s.zip']
    (tmp_path/'.out.part/old').mkdir(parents=True)                        # what a killed process leaves
    (tmp_path/'.out.part/old/half').write_text('x')
    assert not (archives.extract(path, tmp_path/'out')/'old').exists()
    with archives.alone(tmp_path/'out'): fails('another process', lambda: archives.alone(tmp_path/'out').__enter__())

@pytest.mark.parametrize('name', ['s.zip', 's.tar', 's.tar.gz'])
def test_damaged_bytes_end_in_one_line(tmp_path, name):
    "A flipped byte anywhere: either unpacked or refused, never another exception, never a file outside."
    path = tmp_path/'in'/name
    path.parent.mkdir()
    zipped(path, GOOD) if name.endswith('zip') else tarred(path, *GOOD.items(), mode='w:gz' if name.endswith('gz') else 'w')
    data, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for n in range(150):
        bad = bytearray(data)
        bad[rng.integers(min(len(bad), 4000) if n % 2 else len(bad))] ^= int(rng.integers(1, 256))
        path.write_bytes(bad)
        try: archives.extract(path, tmp_path/'out'/str(n))
        except InputError as e:
            refused += 1
            assert name in str(e) and '\n' not in str(e)
    assert refused > 20 and set(os.listdir(tmp_path)) == {'in', 'out'}

def test_checksums_and_download(tmp_path, monkeypatch):
    pytest.importorskip('pooch')
    import hashlib, http.server, threading
    (tmp_path/'www').mkdir()
    data = zipped(tmp_path/'www/set.zip', GOOD).read_bytes()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=tmp_path/'www'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}/'
    table = {'good': ('set.zip', address + 'set.zip', hashlib.md5(data).hexdigest()), 'bad': ('set.zip', address + 'set.zip', '0' * 32),
             'gone': ('no.zip', address + 'no.zip', '0' * 32)}
    monkeypatch.setattr(archives, 'known_archives', lambda: table)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    try:
        path = archives.fetch('good', tmp_path/'in')
        assert path == tmp_path/'in/set.zip' and path.read_bytes() == data and archives.check_archive(path)
        fails('could not be fetched', archives.fetch, 'gone', tmp_path/'in')
        fails('could not be fetched', archives.fetch, 'bad', tmp_path/'else')
        assert not list(tmp_path.glob('else/*'))
    finally:
        server.shutdown()
        server.server_close()
    assert archives.fetch('good', tmp_path/'in') == path                      # there already: no network
    path.write_bytes(data[:-1])
    fails('fetch it again', archives.check_archive, path)

def test_known_archives_come_from_torchvision():
    assert archives.known_archives()['sbd'][0] == 'benchmark.tgz' and all(len(m) == 32 for *_, m in archives.known_archives().values())

# ---- jobs -------------------------------------------------------------------------------------------------------------------
def picture(path, values=None, size=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8) if values is None else values).save(path)
    return path

PALETTE = np.array([[(c >> 16) & 255, (c >> 8) & 255, c & 255] for c in (*P.LAND_COLOURS, 0)], np.uint8)

def land(folder, tiles=6, size=(66, 75), seed=0):
    "Tiles of blocks of colour whose patches pass and fail both filters."
    rng = np.random.default_rng(seed)
    for n in range(tiles):
        blocks = rng.integers(0, 7, (9, 9)).repeat(9, 0).repeat(9, 1)[:size[0], :size[1]]
        if n % 3 == 0: blocks[:, :30] = n % 7
        if n % 3 == 1: blocks[5, 5] = (blocks[5, 5] + 1) % 7            # one odd pixel: below 0.048
        picture(folder/f'{n}_mask.png', PALETTE[blocks])
        picture(folder/f'{n}_sat.jpg', rng.integers(0, 255, (*size, 3), dtype=np.uint8))
    return folder

def stopping(after):
    def progress(done, total):
        if done >= after: raise KeyboardInterrupt
    return progress

def test_interrupted_cut_goes_on(tmp_path):
    src = land(tmp_path/'src')
    P.prepare_deepglobe(src, tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): P.prepare_deepglobe(src, tmp_path/'d', workers=1, progress=stopping(2))
    home = tmp_path/'d/Deepglobe'
    with open(home/P.JOURNAL, 'a') as f: f.write('{"job": "5", "fi')             # torn in the middle of a line
    seen = []
    again = P.prepare_deepglobe(src, tmp_path/'d', progress=lambda d, t: seen.append((d, t)))
    assert 0 < again.made < again.jobs == 6 and seen[0][0] >= 2 and seen[-1] == (6, 6)
    assert shown(tmp_path/'d') == shown(tmp_path/'whole')
    before = {p: p.stat().st_mtime_ns for p in home.rglob('*') if p.is_file()}
    assert P.prepare_deepglobe(src, tmp_path/'d', progress=lambda d, t: seen.append(0)).made == 0 and seen[-1] == (6, 6)
    assert before == {p: p.stat().st_mtime_ns for p in home.rglob('*') if p.is_file()}

def test_killed_cut_goes_on(tmp_path):
    src = land(tmp_path/'src')
    code = f"import os; from cdfss.data.prepare import prepare_deepglobe as p; p({str(src)!r}, {str(tmp_path/'d')!r}, workers=1, progress=lambda d, t: d == 3 and os._exit(9))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 9
    assert P.prepare_deepglobe(src, tmp_path/'d').made == 3
    P.prepare_deepglobe(src, tmp_path/'whole')
    assert shown(tmp_path/'d') == shown(tmp_path/'whole')

def test_lost_files_and_other_options(tmp_path):
    src = land(tmp_path/'src')
    P.prepare_deepglobe(src, tmp_path/'d')
    whole = shown(tmp_path/'d')
    lost = next((tmp_path/'d').rglob('0_mask_*.png'))
    lost.unlink()
    assert P.prepare_deepglobe(src, tmp_path/'d').made == 1 and shown(tmp_path/'d') == whole
    fails('remove the folder or use those options', P.prepare_deepglobe, src, tmp_path/'d', rarest=.1)
    picture(tmp_path/'e/Deepglobe/04_train_cat/1/mine.png')
    fails('this program did not make', P.prepare_deepglobe, src, tmp_path/'e')

# ---- DeepGlobe --------------------------------------------------------------------------------------------------------------
def literal_cut(folder, grid=6, rarest=.048):
    "protocol.md 2.2, step by step, colour by colour as PIL counts them: {(class, mask name): mask}."
    kept = {}
    for path in folder.glob('*_mask.png'):
        mask = Image.open(path).convert('RGB')
        w, h = mask.size
        for i, j in itertools.product(range(grid), range(grid)):
            patch = mask.crop((int(j*w/grid), int(i*h/grid), int((j + 1)*w/grid), int((i + 1)*h/grid)))
            colours = patch.getcolors()
            if len(colours) <= 1 or min(n for n, _ in colours) / (patch.width * patch.height) <= rarest: continue
            bgr = np.asarray(patch)[..., ::-1]
            for c, colour in enumerate([[0, 255, 255], [255, 255, 0], [255, 0, 255], [0, 255, 0], [255, 0, 0], [255, 255, 255]], 1):
                binary = np.zeros(bgr.shape[:2], np.uint8)
                for y, x in itertools.product(*map(range, binary.shape)):
                    if list(bgr[y, x]) == colour: binary[y, x] = 255
                if binary.any(): kept[c, path.name.replace('_mask.png', f'_mask_{i}{j}.png')] = binary
    return kept

@pytest.mark.parametrize('size', [(66, 75), (60, 60), (71, 67)])
def test_cut_is_the_literal_rule(tmp_path, size):
    src = land(tmp_path/'src', 4, size)
    P.prepare_deepglobe(src, tmp_path/'d')
    base, expected = tmp_path/'d/Deepglobe/04_train_cat', literal_cut(src)
    found = {(int(p.parts[-4]), p.name): np.asarray(Image.open(p)) for p in base.rglob('groundtruth/*.png')}
    assert found.keys() == expected.keys() and len(found) > 30 and all((found[k] == expected[k]).all() for k in found)
    assert len({n for _, n in found}) < 4 * 36                                                     # the filters did drop some
    data = open_dataset('deepglobe', tmp_path/'d')
    assert len(data) == len(found)
    it = data.items[0]
    name, cell = it.image.stem.split('_sat_')
    (i, j), (h, w) = map(int, cell), size
    whole = np.asarray(Image.open(src/f'{name}_sat.jpg')).astype(int)[int(i*h/6):int((i + 1)*h/6), int(j*w/6):int((j + 1)*w/6)]
    patch = np.asarray(Image.open(it.image)).astype(int)
    assert patch.shape == whole.shape and np.abs(patch - whole).mean() < 25                         # noise, as JPEG renders it, of the same cell

def test_filter_bound_is_strict_and_odd_colours_count():
    mask = np.zeros((6, 6*125, 3), np.uint8)                               # patches of 1 x 125 = 125 pixels: 6 of them are 0.048
    mask[0, :6] = mask[0, 125:125 + 7] = 255
    assert [(p.i, p.j) for p in P.kept_patches(mask)] == [(0, 1)] and 6 / 125 == .048
    mask[0, 250:290] = (1, 2, 3)                                           # a colour of no class counts in the filter and makes no mask
    kept = {(p.i, p.j): p.masks for p in P.kept_patches(mask)}
    assert kept.keys() == {(0, 1), (0, 2)} and kept[0, 2] == {}
    rng = np.random.default_rng(0)
    odd = rng.integers(0, 3, (60, 60))[..., None] * np.array([1, 7, 100])
    same = [(p.i, p.j, list(p.masks)) for p in P.kept_patches(odd.astype(np.uint8))]
    assert same == [(i, j, []) for i in range(6) for j in range(6)]
    fails('colours: expected a mask in seven', P.kept_patches, rng.integers(0, 255, (300, 300, 3), dtype=np.uint8))

def test_cut_names_faulty_tiles(tmp_path):
    src = land(tmp_path/'src', 2)
    picture(src/'8_sat.jpg')
    assert '1 tiles without a mask' in P.prepare_deepglobe(src, tmp_path/'a').notes[1]
    picture(src/'8_mask.png', size=(12, 17))
    fails('8_mask.png: its size differs', P.prepare_deepglobe, src, tmp_path/'b')
    _cut(src/'1_mask.png', 60)
    (src/'8_mask.png').unlink()
    fails('1_mask.png: cannot be read', P.prepare_deepglobe, src, tmp_path/'c')
    fails('no <id>_sat.jpg', P.prepare_deepglobe, tmp_path/'a/Deepglobe', tmp_path/'e')
    fails('no such folder or archive', P.prepare_deepglobe, tmp_path/'nowhere', tmp_path/'e')
    fails('grid=11', P.prepare_deepglobe, src, tmp_path/'e', grid=11)

def test_a_tile_of_full_size_takes_under_two_seconds():
    import time
    codes = np.random.default_rng(0).integers(0, 7, (68, 68)).repeat(36, 0).repeat(36, 1)
    mask, began = PALETTE[codes], time.process_time()
    assert len(P.kept_patches(mask)) > 0 and time.process_time() - began < 2

# ---- VOC --------------------------------------------------------------------------------------------------------------------
def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')

def voc_raw(folder):
    "VOC with train t0-t2 and val v0-v1; SBD with train t0, v0, s0, s1 and val s2, t1."
    rng, voc, sbd = np.random.default_rng(0), folder/'VOCdevkit/VOC2012', folder/'benchmark_RELEASE/dataset'
    truth = {}
    for n, i in enumerate(['t0', 't1', 't2', 'v0', 'v1', 's0', 's1', 's2']):
        picture(voc/f'JPEGImages/{i}.jpg', rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        if i[0] in 'tv':
            im = Image.fromarray(rng.choice([0, n + 1, 255], (12, 16)).astype(np.uint8)).convert('P')
            im.putpalette([*range(256)] * 3)
            (voc/'SegmentationClass').mkdir(parents=True, exist_ok=True)
            im.save(voc/f'SegmentationClass/{i}.png')
            truth[i] = np.asarray(im)
    write_lines(voc/'ImageSets/Segmentation/train.txt', 't0', 't1', 't2')
    write_lines(voc/'ImageSets/Segmentation/val.txt', 'v0', 'v1')
    for i in ['t0', 't1', 'v0', 's0', 's1', 's2']:
        values = rng.integers(0, 21, (12, 16)).astype(np.uint8)
        (sbd/'cls').mkdir(parents=True, exist_ok=True)
        savemat(sbd/f'cls/{i}.mat', {'GTcls': {'Segmentation': values, 'Boundaries': 0, 'CategoriesPresent': 0}})
        truth.setdefault(i, values)
    write_lines(sbd/'train.txt', 't0', 'v0', 's0', 's1')
    write_lines(sbd/'val.txt', 's2', 't1')
    return truth

def test_voc_and_sbd(tmp_path):
    truth = voc_raw(tmp_path/'src')
    done = P.prepare_voc(tmp_path/'src', tmp_path/'d')
    base = tmp_path/'d/VOC2012'
    lists = {s: (base/f'ImageSets/Segmentation/{s}.txt').read_text().split() for s in ('trainaug', 'val', 'train')}
    train, val, sbd = {'t0', 't1', 't2'}, {'v0', 'v1'}, {'t0', 'v0', 's0', 's1', 's2', 't1'}
    assert lists == dict(trainaug=sorted((train | sbd) - val), val=sorted(val), train=sorted(train))
    masks = {p.stem: np.asarray(Image.open(p)) for p in (base/'SegmentationClassAug').glob('*.png')}
    assert masks.keys() == truth.keys() and all((masks[i] == truth[i]).all() for i in truth) and done.made == 8
    assert len(open_dataset('voc', tmp_path/'d').items) > 5 and open_dataset('voc', tmp_path/'d', 'val').items
    assert P.prepare_voc(tmp_path/'src', tmp_path/'d').made == 0

def test_voc_from_a_ready_folder_and_from_archives(tmp_path):
    truth = voc_raw(tmp_path/'src')
    P.prepare_voc(tmp_path/'src', tmp_path/'a')
    downloads = tmp_path/'downloads'
    downloads.mkdir()
    for name, folders in {'VOCtrainval.tar': ['VOCdevkit'], 'SegmentationClassAug.zip': []}.items():
        if folders:
            with tarfile.open(downloads/name, 'w') as t: t.add(tmp_path/'src/VOCdevkit', 'VOCdevkit')
        else: zipped(downloads/name, {f'SegmentationClassAug/{p.name}': p.read_bytes() for p in (tmp_path/'a/VOC2012/SegmentationClassAug').iterdir()})
    said = []
    P.prepare_voc(downloads, tmp_path/'b', say=said.append)
    assert shown(tmp_path/'a') == shown(tmp_path/'b') and len(said) == 2 and 'no published checksum' in said[0]
    assert P.prepare_voc(downloads, tmp_path/'b', say=said.append).made == 0 and len(said) == 2

def test_voc_faults(tmp_path):
    voc_raw(tmp_path/'src')
    sbd, voc = tmp_path/'src/benchmark_RELEASE/dataset', tmp_path/'src/VOCdevkit/VOC2012'
    (voc/'JPEGImages/s1.jpg').unlink()
    assert 's1' in fails('1 images missing', P.prepare_voc, tmp_path/'src', tmp_path/'d')
    picture(sbd/'img/s1.jpg')                                                # SBD's own copy serves
    (sbd/'cls/s2.mat').write_bytes(b'junk')
    fails('s2.mat: no SBD class map', P.prepare_voc, tmp_path/'src', tmp_path/'d')
    savemat(sbd/'cls/s2.mat', {'GTcls': {'Segmentation': np.full((4, 4), 77, np.uint8)}})
    fails('s2.mat: expected a map', P.prepare_voc, tmp_path/'src', tmp_path/'d')
    (sbd/'train.txt').unlink()
    fails('neither SBD', P.prepare_voc, tmp_path/'src', tmp_path/'d')
    picture(tmp_path/'e/VOC2012/SegmentationClassAug/mine.png')
    voc_raw(tmp_path/'src')
    fails('this program did not make', P.prepare_voc, tmp_path/'src', tmp_path/'e')
    fails('no folder with JPEGImages', P.prepare_voc, sbd, tmp_path/'d')

# ---- ISIC, chest, FSS, COCO ---------------------------------------------------------------------------------------------------
def isic_raw(folder, n=9):
    ids = [f'ISIC_{k:07d}' for k in range(n)]
    for k, i in enumerate(ids):
        picture(folder/f'a/ISIC2018_Task1-2_Training_Input/{i}.jpg', np.full((12, 16, 3), k, np.uint8))
        picture(folder/f'b/ISIC2018_Task1_Training_GroundTruth/{i}_segmentation.png', np.full((12, 16), 255, np.uint8))
    for f in ('a/ISIC2018_Task1-2_Training_Input', 'b/ISIC2018_Task1_Training_GroundTruth'): write_lines(folder/f/'LICENSE.txt', 'x')
    write_lines(folder/'class_id.csv', 'ID,Class', *(f'{i},{ISIC[k % 3]}' for k, i in enumerate(ids)))
    return ids

@pytest.mark.parametrize('numbering, order', [('ifa', ['nevus', 'seborrheic_keratosis', 'melanoma']), ('dr-adapter', ['seborrheic_keratosis', 'nevus', 'melanoma'])])
@pytest.mark.parametrize('how', P.PLACES)
def test_isic_folders(tmp_path, numbering, order, how):
    ids = isic_raw(tmp_path/'src')
    P.prepare_isic(tmp_path/'src', tmp_path/'d', numbering, how)
    base = tmp_path/'d/ISIC/ISIC2018_Task1-2_Training_Input'
    for n, c in enumerate(order, 1): assert sorted(p.stem for p in (base/str(n)).iterdir()) == [i for k, i in enumerate(ids) if ISIC[k % 3] == c]
    assert open_dataset('isic', tmp_path/'d').classes == tuple(order) and len(open_dataset('isic', tmp_path/'d')) == 9
    one, source = base/'1'/sorted(os.listdir(base/'1'))[0], tmp_path/'src/a/ISIC2018_Task1-2_Training_Input'
    assert (one.is_symlink(), one.samefile(source/one.name)) == {'link': (False, True), 'symlink': (True, True), 'copy': (False, False)}[how]
    fails('use those options', P.prepare_isic, tmp_path/'src', tmp_path/'d', 'ifa' if numbering != 'ifa' else 'dr-adapter')

def test_isic_names_missing_ids(tmp_path):
    ids = isic_raw(tmp_path/'src')
    (tmp_path/f'src/b/ISIC2018_Task1_Training_GroundTruth/{ids[4]}_segmentation.png').unlink()
    assert ids[4] in fails('1 masks missing', P.prepare_isic, tmp_path/'src', tmp_path/'d')
    (tmp_path/f'src/a/ISIC2018_Task1-2_Training_Input/{ids[2]}.jpg').unlink()
    assert ids[2] in fails('1 images missing', P.prepare_isic, tmp_path/'src', tmp_path/'d')
    write_lines(tmp_path/'src/class_id.csv', 'ID,Class', f'{ids[0]},nevus')
    fails('rows missing', P.prepare_isic, tmp_path/'src', tmp_path/'d')
    write_lines(tmp_path/'src/class_id.csv', 'ID,Class', f'{ids[0]},mole')
    fails("class 'mole'", P.prepare_isic, tmp_path/'src', tmp_path/'d')
    (tmp_path/'src/class_id.csv').unlink()
    fails('no table class_id.csv', P.prepare_isic, tmp_path/'src', tmp_path/'d')
    fails("did you mean 'ifa'", P.prepare_isic, tmp_path/'src', tmp_path/'d', 'iffa')

def test_isic_in_place(tmp_path):
    isic_raw(tmp_path/'raw')
    (tmp_path/'d').mkdir()
    (tmp_path/'raw/a').rename(tmp_path/'d/ISIC')
    (tmp_path/'raw/b/ISIC2018_Task1_Training_GroundTruth').rename(tmp_path/'d/ISIC/ISIC2018_Task1_Training_GroundTruth')
    (tmp_path/'raw/class_id.csv').rename(tmp_path/'d/ISIC/class_id.csv')
    P.prepare_isic(tmp_path/'d', tmp_path/'d')
    assert len(open_dataset('isic', tmp_path/'d')) == 9

def test_lungs(tmp_path):
    rng, truth, src = np.random.default_rng(0), {}, tmp_path/'src'
    for n in range(3):
        name = f'MCUCXR_000{n}_{n % 2}'
        picture(src/f'MontgomerySet/CXR_png/{name}.png')
        halves = [np.where(rng.random((12, 16)) > .7, 255, 0).astype(np.uint8) for _ in 'lr']
        picture(src/f'MontgomerySet/ManualMask/leftMask/{name}.png', halves[0])
        (src/'MontgomerySet/ManualMask/rightMask').mkdir(parents=True, exist_ok=True)
        Image.fromarray(halves[1]).convert('1').save(src/f'MontgomerySet/ManualMask/rightMask/{name}.png')           # 1-bit, as the official ones
        truth[name] = np.array([[max(a, b) for a, b in zip(*rows)] for rows in zip(*halves)])
        picture(src/f'ChinaSet_AllFiles/CXR_png/CHNCXR_000{n}_0.png')
    for n in range(2): truth[f'CHNCXR_000{n}_0'] = np.asarray(Image.open(picture(src/f'mask/CHNCXR_000{n}_0_mask.png', halves[n])))
    for montgomery, suffix in (('same', ''), ('mask', '_mask')):
        done = P.prepare_chest(src, tmp_path/montgomery, montgomery)
        base = tmp_path/montgomery/'LungSegmentation'
        assert {p.stem for p in (base/'masks').iterdir()} == {i + (suffix if i[0] == 'M' else '_mask') for i in truth}
        assert all((np.asarray(Image.open(base/'masks'/f'{i}{suffix if i[0] == "M" else "_mask"}.png')) == m).all() for i, m in truth.items())
        assert len(open_dataset('chest', tmp_path/montgomery)) == 5 and done.notes == ['Montgomery 3, Shenzhen 2', '1 images without a mask, left out']
    again = P.prepare_chest(tmp_path/'same', tmp_path/'kaggle')                                     # from the published layout itself
    assert again.jobs == 5 and {n.split('/')[-1] for n in shown(tmp_path/'kaggle')} == {n.split('/')[-1] for n in shown(tmp_path/'same')}
    next((src/'MontgomerySet/ManualMask/leftMask').iterdir()).unlink()
    fails('1 left or right masks missing', P.prepare_chest, src, tmp_path/'x')
    fails('no image of CXR_png', P.prepare_chest, src/'mask', tmp_path/'x')

def test_fss_from_a_nested_zip(tmp_path):
    for c, n in itertools.product(('abacus', 'b.c', 'zebra'), range(1, 11)):
        picture(tmp_path/f'raw/{c}/{n}.jpg', np.full((8, 8, 3), n, np.uint8))
        picture(tmp_path/f'raw/{c}/{n}.png', np.full((8, 8, 3), 255, np.uint8))
    files = {f'fewshot_data/fewshot_data/{n}': c for n, c in shown(tmp_path/'raw').items()}
    lists = {f'splits/fss/{s}.txt': f'{c}\n'.encode() for s, c in zip(('trn', 'val', 'test'), ('abacus', 'b.c', 'zebra'))}
    (tmp_path/'z').mkdir()
    zipped(tmp_path/'z/fss.zip', {**files, **lists})
    done = P.prepare_fss(tmp_path/'z/fss.zip', tmp_path/'d')
    assert {n.removeprefix('FSS-1000/'): c for n, c in shown(tmp_path/'d').items() if n.startswith('FSS')} == shown(tmp_path/'raw')
    assert open_dataset('fss', tmp_path/'d', 'test').classes == ('zebra',) and done.notes == ['3 classes, the published set has 1000', 'split lists copied']
    (tmp_path/'raw/zebra/3.png').unlink()
    assert 'zebra/3' in fails('1 masks missing', P.prepare_fss, tmp_path/'raw', tmp_path/'e')

def test_coco_masks(tmp_path):
    pytest.importorskip('pycocotools')
    def square(i, image, cat, x, y, w, h, crowd=False):
        poly = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        counts, inside = [0], False
        for col, row in itertools.product(range(16), range(12)):           # run lengths, column by column
            now = x <= col < x + w and y <= row < y + h
            if now != inside: counts.append(0); inside = now
            counts[-1] += 1
        return dict(id=i, image_id=image, category_id=cat, iscrowd=int(crowd), area=w*h, bbox=[x, y, w, h],
                    segmentation=dict(counts=counts, size=[12, 16]) if crowd else poly)
    marks = [square(5, 1, 7, 2, 2, 3, 3), square(4, 1, 3, 0, 0, 10, 8), square(6, 1, 7, 9, 6, 6, 5, crowd=True), square(9, 2, 3, 4, 4, 4, 4)]
    path = tmp_path/'src/annotations/instances_val2017.json'
    write_lines(path, json.dumps(dict(images=[dict(id=i, file_name=f'{i:012d}.jpg', width=16, height=12) for i in (1, 2, 3)], annotations=marks,
                                      categories=[dict(id=7, name='dog'), dict(id=3, name='car')])))
    def filled(*rects):
        m = np.zeros((12, 16), int)
        for (x, y, w, h), v in rects: m[y:y + h, x:x + w] = v
        return m
    made = {}
    for kind in P.COCO_KINDS:
        assert P.prepare_coco(tmp_path/'src', tmp_path/'d', kind).jobs == 3 and P.prepare_coco(tmp_path/'src', tmp_path/'d', kind).made == 0
        made[kind] = {p.relative_to(tmp_path/f'd/COCO/masks_{kind}/val2017').as_posix(): np.asarray(Image.open(p)).astype(int)
                      for p in (tmp_path/f'd/COCO/masks_{kind}').rglob('*.png')}
    car, dog, crowd = (0, 0, 10, 8), (2, 2, 3, 3), (9, 6, 6, 5)
    expected = {'binary': {'01/000000000001.png': filled((car, 255)), '02/000000000001.png': filled((dog, 255), (crowd, 255)), '01/000000000002.png': filled(((4, 4, 4, 4), 255))},
                'index': {'000000000001.png': filled((crowd, 255), (car, 1), (dog, 2)), '000000000002.png': filled(((4, 4, 4, 4), 1)), '000000000003.png': filled()},
                'instance': {'000000000001.png': filled((car, 1), (dog, 2), (crowd, 3)), '000000000002.png': filled(((4, 4, 4, 4), 1)), '000000000003.png': filled()}}
    for kind, masks in expected.items():
        assert made[kind].keys() == masks.keys()
        for n in masks: assert (made[kind][n] == masks[n]).all(), (kind, n)
    assert (tmp_path/'d/COCO/classes.txt').read_text().split() == ['car', 'dog']
    path.write_text('[1]')
    fails('no readable instance annotations', P.prepare_coco, tmp_path/'src', tmp_path/'x')

def test_coco_without_pycocotools(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pycocotools.coco', None)
    write_lines(tmp_path/'src/instances_val2017.json', '{}')
    fails('pip install pycocotools', P.prepare_coco, tmp_path/'src', tmp_path/'d')

# ---- settings and the notebook --------------------------------------------------------------------------------------------------
def test_settings(tmp_path, capsys):
    isic_raw(tmp_path/'src')
    make = lambda **o: P.PrepareSettings(dataset='isic', source=str(tmp_path/'src'), data_root=str(tmp_path/'d'), **o)
    manifest = tmp_path/'manifest.json'
    manifest.write_text(json.dumps(archives.file_manifest(tmp_path/'src')))
    done = P.prepare(make(numbering='dr-adapter', manifest=str(manifest)))
    assert done.made == 9 and '9/9' in capsys.readouterr().out and "numbering 'dr-adapter'" in str(done)
    (tmp_path/'src/class_id.csv').write_text('other')
    assert 'class_id.csv: other content' in fails('1 files differ', P.prepare, make(manifest=str(manifest)))
    fails('source: needed', P.prepare, P.PrepareSettings(dataset='isic', data_root='x'))
    fails('no stable official address', P.prepare, make(download=True))
    fails("did you mean 'isic'", P.PrepareSettings, dataset='isik')

def test_notebook_parameters_are_the_settings(repo):
    from cdfss.engine.runs import parameters_cell
    cells = json.loads((repo/'nbs/prepare.ipynb').read_text())['cells']
    tagged = [''.join(c['source']) for c in cells if 'parameters' in c['metadata'].get('tags', [])]
    assert 'skip_exec: true' in ''.join(cells[0]['source']) and len(tagged) == 1
    strip = lambda text: [l for l in text.splitlines() if l and not l.startswith('#')]
    assert strip(tagged[0]) == strip(parameters_cell(P.PrepareSettings))

@pytest.mark.slow
def test_notebook_runs(tmp_path, repo):
    isic_raw(tmp_path/'src')
    run = lambda *p: subprocess.run([sys.executable, '-m', 'papermill', str(repo/'nbs/prepare.ipynb'), str(tmp_path/'out.ipynb'), '--log-output', '--no-progress-bar', *p],
                                    capture_output=True, text=True)
    r = run('-p', 'dataset', 'isic', '-p', 'source', str(tmp_path/'src'), '-p', 'data_root', str(tmp_path/'d'))
    assert r.returncode == 0 and 'no faults' in r.stderr, r.stderr[-2000:]

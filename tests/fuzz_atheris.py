"""Coverage-guided fuzzing of what reads bytes: checkpoints, states, image records, manifests, masks. By hand, and only where atheris is installed (pip install atheris; Linux).

    make fuzz-deep ARGS="--seconds 120"            each reader in turn
    python tests/fuzz_atheris.py mask torch

`tests/test_fuzz.py` damages good files at random, under the bounds of time and memory; here libFuzzer keeps every input that reaches a new line of the readers and mutates it further, which finds the
odd byte that leads to a branch. It sees Python alone: torch's, safetensors' and Pillow's compiled parts are run, not followed. What a reader may do is the same: an answer, or an `InputError` of one
line. Anything else, more than 20 s or 2 GiB ends the run, and the input is left in the folder --keep."""
import argparse, io, json, os, subprocess, sys, tempfile, traceback, warnings
from pathlib import Path

def seeds(dataset) -> dict[str, list[bytes]]:
    "Small good inputs of each reader."
    import numpy as np, torch
    from PIL import Image
    from safetensors.torch import save
    from cdfss.data.images import _pack
    from cdfss.data.manifests import draw
    from cdfss.engine.runs import save_state
    state = {'a.weight': torch.arange(4.).view(2, 2), 'b': torch.ones(1, dtype=torch.long)}
    def torch_bytes(**how):
        torch.save({'state_dict': state}, out := io.BytesIO(), **how)
        return out.getvalue()
    def picture(mode, kind):
        Image.fromarray((np.arange(35, dtype=np.uint8) % 3).reshape(5, 7)).convert(mode).save(out := io.BytesIO(), kind)
        return out.getvalue()
    with tempfile.TemporaryDirectory() as d:
        save_state(Path(d, 's.pt'), dict(model=state, step=1))
        kept = Path(d, 's.pt').read_bytes()
    return dict(safetensors=[save(state)], torch=[torch_bytes(), torch_bytes(_use_new_zipfile_serialization=False)], state=[kept], record=[_pack({'native': [2, 2]}, np.zeros((2, 3), np.uint8))],
                manifest=[json.dumps(draw('balanced', dataset, k, 0, 3).to_json()).encode() for k in (1, 2)], mask=[picture('P', 'PNG'), picture('L', 'BMP'), picture('L', 'TIFF'), picture('L', 'GIF')])

def readers(place:Path, dataset) -> dict:
    "What each reader does with the file in `place`."
    import numpy as np
    from cdfss.data.images import _read_meta, _unpack, decode_mask
    from cdfss.data.manifests import Manifest
    from cdfss.engine.runs import load_state_file
    from cdfss.models.backbones import read_state
    def state(p):
        load_state_file(p)
        for left in place.glob('*.damaged'): left.unlink()
    def record(p): _read_meta(p), _unpack(np.fromfile(p, np.uint8))
    def mask(p):
        for index in (True, False):
            try: decode_mask(p, 8, index)
            except InputError as e: check(e)
    return dict(safetensors=('w.safetensors', read_state), torch=('w.pth', read_state), state=('state.pt', state), record=('record', record), manifest=('m.json', lambda p: Manifest.load(p, dataset)), mask=('m.png', mask))

def check(e:Exception): assert '\n' not in str(e) and str(e).isprintable() and len(str(e)) < 4000, str(e)

def one(name:str, seconds:int, keep:Path):
    "Fuzz a reader in this process, which libFuzzer ends."
    global InputError
    import atheris
    warnings.simplefilter('ignore')
    with atheris.instrument_imports(include=['cdfss.data.images', 'cdfss.data.manifests', 'cdfss.models.backbones', 'cdfss.engine.runs', 'torch._weights_only_unpickler', 'PIL.PngImagePlugin', 'PIL.BmpImagePlugin', 'PIL.TiffImagePlugin', 'PIL.GifImagePlugin']):
        from cdfss.basics import InputError
        import cdfss.data.images, cdfss.data.manifests, cdfss.engine.runs, cdfss.models.backbones          # noqa
    from cdfss.data.layouts import open_dataset
    from fakes import polyps
    place = Path(tempfile.mkdtemp(prefix='cdfss-fuzz-'))
    (place/'seeds').mkdir(); (place/'found').mkdir(); keep.mkdir(parents=True, exist_ok=True)
    dataset = open_dataset('kvasir', polyps(place/'data', 4))
    for n, content in enumerate(seeds(dataset)[name]): (place/'seeds'/str(n)).write_bytes(content)
    file, read = readers(place, dataset)[name]
    sys.stderr = open(os.devnull, 'w')                              # of the readers; libFuzzer writes to the descriptor
    def look(content:bytes):
        (place/file).write_bytes(content)
        try: read(place/file)
        except InputError as e: check(e)
        except BaseException:
            os.write(2, traceback.format_exc()[-3000:].encode())
            raise
    atheris.Setup([sys.argv[0], f'-max_total_time={seconds}', '-timeout=20', '-rss_limit_mb=2048', '-max_len=8192', f'-artifact_prefix={keep}/{name}-', '-print_final_stats=1', str(place/'found'), str(place/'seeds')], look)
    atheris.Fuzz()

NAMES = ('safetensors', 'torch', 'state', 'record', 'manifest', 'mask')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('readers', nargs='*', default=[], help=', '.join(NAMES)); p.add_argument('--seconds', type=int, default=60, help='a reader'); p.add_argument('--keep', type=Path, default=Path('runs/fuzz'))
    p.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if unknown := set(a.readers) - set(NAMES): p.error(f'no such reader: {", ".join(unknown)}; choose from {", ".join(NAMES)}')
    try: import atheris                                               # noqa
    except ImportError: sys.exit('error: atheris is not installed; pip install atheris (Linux, an optional tool), or `make fuzz`, which needs none')
    if a.one: return one(a.readers[0], a.seconds, a.keep.resolve())
    faulty = []
    for name in a.readers or NAMES:
        r = subprocess.run([sys.executable, __file__, name, '--one', '--seconds', str(a.seconds), '--keep', str(a.keep)], capture_output=True, text=True, errors='replace')
        said = [l for l in (r.stdout + r.stderr).splitlines() if l.startswith(('stat::number_of_executed', 'stat::new_units', 'stat::peak_rss')) or 'Error' in l or 'ERROR' in l or 'Test unit written' in l]
        print(f'{name}: {"FAULT" if r.returncode else "no fault"}  ' + '  '.join(' '.join(l.removeprefix('stat::').split()) for l in said[:12]), flush=True)
        if r.returncode:
            faulty.append(name)
            print('\n'.join((r.stdout + r.stderr).splitlines()[-40:]))
    sys.exit(bool(faulty))

if __name__ == '__main__': main()

"A made-up study: run folders with records as the engine and the diagnostics write them, in which every effect is known."
import itertools
import numpy as np, pandas as pd
from cdfss.basics import atomic_write, write_json
from cdfss.diagnostics.diagnosis import trained_as
from cdfss.engine.metrics import bootstrap, class_miou
from cdfss.engine.runs import Run
from cdfss.methods.seams import parse_recipe
from cdfss.report.figures import Study

TARGETS, STAGES = ('fss', 'isic', 'chest'), ('stem', 'stage1', 'stage2', 'stage3')
MANIFESTS = {f'{t}-1shot': f'{k}'*16 for k, t in enumerate(TARGETS)}

def _episodes(method:str, target:str, epoch:int, level:float, rng, n:int=12) -> pd.DataFrame:
    "Episodes whose IoU is about `level` percent."
    iou = np.clip(level/100 + .005*rng.standard_normal(n), .01, .99)
    tp = (1000*iou).astype(int)
    return pd.DataFrame(dict(target=target, shot=1, method=method, epoch=epoch, index=range(n), query=[f'q{i}' for i in range(n)], supports=[f's{i}' for i in range(n)],
                             cls=np.arange(n) % 2, tp=tp, fp=1000 - tp, fn=0, tn=8000, seconds=.01))

def level(method:str, freeze:str, target:str, epoch:int, seed:int) -> float:
    "mIoU: far targets gain 5 points by LFM on HSNet; on SSP they fall by 4 points after epoch 1 unless LEM trains or shallow stages are frozen; LCM adds 3, LEM 1."
    modules, far = parse_recipe(method).modules, target != 'fss'
    fall = 2*max(epoch - 1, 0)*(far and 'lem' not in modules and freeze == 'none')
    if modules and modules[0].startswith('apm'): return 30 + 5*far + .3*seed
    if 'hsnet' in method: return 30 + .3*seed
    return 40 + 3*min(epoch, 1) - fall + 3*('lcm' in modules) + ('lem' in modules) + .3*seed

def _diagnostics(run:Run, recipe:str, seed:int, rng):
    shaky = lambda: .2*rng.standard_normal()
    with_span = lambda **kw: kw | {k: v for name in ('drop', 'cka', 'gain', 'value', 'rho', 'lean') if name in kw for k, v in
                                   zip((f'{name}_low', f'{name}_high') if name in ('drop', 'gain', 'lean') else ('low', 'high'), (kw[name] - .5, kw[name] + .5))}
    lem, where = 'lem' in recipe, (*TARGETS, 'voc')
    frames = dict(
        sharpness=dict(sharpness=[with_span(kind='feature', model=m, target=t, stage=s, strength=r, drop=r*(30 - 6*k - 5*lem) + shaky())
                                  for m in ('pretrained', 'trained') for t in where for k, s in enumerate(STAGES) for r in (.1, .2, .5)]),
        cka=dict(domain_cka=[with_span(target=t, layer=s, form=f, model=m, cka=.5 + .1*k + .05*lem*(m == 'trained') + .002*rng.standard_normal())
                             for m in ('pretrained', 'trained') for t in where for k, s in enumerate(STAGES) for f in ('gram', 'covariance')]),
        frequency=dict(combinations=[with_span(target=t, level=l, cutoff=.25, amplitude=a, phase=p, miou=40., gain=0. if a == p == 'all' else (2. if (a, p) == ('low', 'all') and t != 'fss' else -3.) + shaky())
                                     for t in where for l in ('image', 'feature') for a, p in itertools.product(('all', 'low', 'high'), repeat=2)],
                       cdf=[with_span(target=t, level='feature', condition=c, r=r, value=r**(1/(1 + ('best' in c)))) for t in where for c in ('plain', 'best: A low, P all, 0.25', 'recipe') for r in np.linspace(0, 1, 11)],
                       relation=[with_span(target=t, level='feature', condition=c, rho=shaky()/10, fall=.1 + shaky()/50) for t in where for c in ('best: A low, P all, 0.25', 'recipe')]),
        errors=dict(errors=[with_span(target=t, shot=1, method=m, lean=v + shaky(), reading='aggressive' if v > 0 else 'conservative') for t in where for m, v in (('segmenter', 1.), ('prototype', -4.), ('affinity', 6.))]))
    for name, parts in frames.items():
        for f, rows in parts.items(): run.write_frame(f'diagnostics/{recipe}/{name}/{f}.parquet', pd.DataFrame(rows))
        write_json(run.path/'diagnostics'/recipe/name/'how.json', dict(how={}, frames=list(parts)))

def a_run(folder, method:str, freeze:str, seed:int, epochs:int=3) -> Run:
    run, rng = Run(folder/f'{method}-{freeze}-{seed}'), np.random.default_rng([seed, len(method), len(freeze)])
    methods = list(dict.fromkeys([method, str(parse_recipe(method).without('adapt', 'test'))]))
    params = dict(method=method, freeze=freeze, seed=seed, epochs=epochs, data_root=None, backbone='miniature', source='voc', targets=','.join(TARGETS), shots='1')
    write_json(run.path/'params.json', params)
    write_json(run.path/'env.json', dict(commit='0123456789', dirty=False, device='CPU, 2 threads', torch='2.15.0'))
    last = pd.concat([_episodes(m, t, epochs, level(m, freeze, t, epochs, seed), rng) for m in methods for t in TARGETS], ignore_index=True)
    run.write_frame('episodes.parquet', last)
    followed = [_episodes(m, t, e, level(m, freeze, t, e, seed), rng) for e in range(epochs + 1) for m in methods for t in (*TARGETS, 'voc')]
    run.write_frame('followed.parquet', pd.concat(followed, ignore_index=True))
    results = [dict(zip(('class_miou', 'low', 'high'), bootstrap(f, draws=50)), method=m, target=t, shot=1, episodes=len(f), fb_iou=60., mean_episode_iou=50., ifa_compat=60.)
               for (m, t), f in last.groupby(['method', 'target'], sort=False)]
    pictures = {}
    for t, i in itertools.product(TARGETS, (3, 7)):
        mask = np.zeros((24, 24), bool)
        mask[6:18, 6:6 + i] = True
        image = rng.integers(0, 256, (3, 24, 24), dtype=np.uint8)
        arrays = dict(support=image, support_mask=mask, query=image, query_mask=mask, **{f'prediction:{m}': np.roll(mask, k) for k, m in enumerate(methods)})
        pictures |= {f'{t}/1/{i}/{k}': v for k, v in arrays.items()}
    atomic_write(run.path/'samples.npz', lambda p: np.savez_compressed(open(p, 'wb'), **pictures))
    write_json(run.path/'metrics.json', dict(protocol='patnet', seed=seed, epoch=epochs, results=results, manifests=MANIFESTS))
    if freeze in ('none', 'all'): _diagnostics(run, trained_as(run), seed, rng)
    return run

def made_up(folder, seeds=(0, 1)) -> Study:
    grid = [('ssp+lcm', 'none'), ('ssp+lem+lcm', 'none'), ('ssp+lcm', 'stem'), ('ssp+lcm', 'stem+stage1')]
    parts = {'loec': [a_run(folder, m, f, s) for m, f in grid for s in seeds], 'lfm': [a_run(folder, 'hsnet+apm_m+acpa', 'all', s) for s in seeds]}
    for name, runs in parts.items(): Study(runs).write(name, folder)
    return Study.read(folder)

"Runs under named protocols, given manifests, and the guard, through `train` itself."
import shutil
import pytest
from cdfss.basics import InputError
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.data.miniature import miniature_root
from cdfss.engine.protocols import compare
from cdfss.engine.train import TrainSettings, prepare, resolve, train
from cdfss.report import tables

pytestmark = pytest.mark.usefixtures('one_thread')
quiet = dict(say=lambda line: None)

def settings(miniature, runs, **kw):
    return TrainSettings(**(dict(method='prototype', data_root=miniature and str(miniature), backbone='miniature', weights='none', size=48, epochs=0, track='none', samples=0, shots='1',
                                 targets='isic,chest', test_episodes=30, track_episodes=6, runs=str(runs)) | kw))

def test_a_manifest_file_gives_exactly_its_episodes(miniature, tmp_path):
    isic = open_dataset('isic', miniature)
    for k in (1, 5): draw('exhaustive', isic, k, seed=3, episodes=12).save(tmp_path/'m'/f'{k}.json')
    run = train(settings(miniature, tmp_path, manifest=str(tmp_path/'m')), **quiet)
    assert run.metrics['protocol'] == 'manifest' and {(r['target'], r['shot'], r['episodes']) for r in run.metrics['results']} == {('isic', 1, 12), ('isic', 5, 12)}
    wanted = draw('exhaustive', isic, 5, seed=3, episodes=12)
    assert run.metrics['manifests']['isic-5shot'] == wanted.hash
    assert run.episodes.query('shot == 5')['query'].tolist() == [ids[0] for ids in wanted.ids]
    with pytest.raises(InputError, match='manifest=.*no such file'): resolve(settings(miniature, tmp_path, manifest='nowhere.json'))

def test_the_ifa_protocol_takes_the_val_classes(tmp_path):
    miniature = miniature_root()
    patnet, ifa = (prepare(resolve(settings(miniature, tmp_path, targets='fss', protocol=p, test_episodes=None))) for p in ('patnet', 'ifa'))
    assert (patnet.targets['fss'].dataset.split, ifa.targets['fss'].dataset.split) == ('test', 'val')
    assert not {i for m in ifa.manifests.values() for e in m.ids for i in e} & {i for m in patnet.manifests.values() for e in m.ids for i in e}

def test_a_target_image_planted_in_the_source_stops_the_run(miniature, tmp_path):
    root = tmp_path/'data'
    shutil.copytree(miniature, root)
    lesion = open_dataset('isic', root).items[0]
    shutil.copy(lesion.image, open_dataset('voc', root, 'trn').items[0].image)
    s = settings(root, tmp_path, targets='isic', test_episodes=600)
    with pytest.raises(InputError, match=lesion.image.name): prepare(resolve(s))
    run = train(settings(root, tmp_path, targets='isic', test_episodes=600, guard=False), **quiet)
    assert not run.metrics['guard']['on'] and lesion.image.name in run.metrics['guard']['leaks'][0]
    assert 'guard off' in tables.wide(tables.results([run.path])).attrs['caption'].lower()

def test_comparing_runs(miniature, tmp_path):
    a, b, other = (train(settings(miniature, tmp_path, **kw), **quiet) for kw in ({}, dict(method='ssp'), dict(test_seed=1)))
    table = compare(a, b)
    assert {'isic', 'chest'} <= set(table.target) and {'low', 'high'} <= set(table)
    with pytest.raises(InputError): compare(a, other)

def test_the_mean_over_targets_has_an_interval(miniature, tmp_path):
    run = train(settings(miniature, tmp_path), **quiet)
    assert '[' in tables.wide(tables.results([run.path]))['mean 1-shot'].iloc[0]
    assert run.metrics['guard'] == {'on': True, 'leaks': []}

def test_house_rules_nest_their_shots(miniature, tmp_path):
    def drawn(**kw): return prepare(resolve(settings(miniature, tmp_path, targets='isic', shots='1,5', **kw))).manifests
    for kw, nests in ((dict(protocol='balanced'), True), (dict(), False), (dict(nest=True), True), (dict(protocol='balanced', nest=False), False)):
        one, five = (drawn(**kw)['isic', k] for k in (1, 5))
        assert (one.episodes == [(q, s[:1], c) for q, s, c in five.episodes]) == nests

def test_the_affinity_learners_cross_domains(tmp_path):
    "Trained on all classes of the source, they are asked about the four targets like any other method."
    how = dict(data_root=None, targets='fss,deepglobe,isic,chest', epochs=1, fit_episodes=8, test_episodes=3, track_episodes=3, sccan_blocks=2)
    data, tables_of = prepare(resolve(settings(None, tmp_path, **how))), {}
    for method in ('sccan', 'hdmnet', 'pahnet'):
        run = train(settings(None, tmp_path, **how | dict(method=method)), data, **quiet)
        assert run.metrics['protocol'] == 'patnet' and run.params['fold'] is None and len(data.source.dataset.by_class) == 15
        assert {(r['target'], r['shot'], r['episodes']) for r in run.metrics['results']} == {(t, 1, 3) for t in ('fss', 'deepglobe', 'isic', 'chest')}
        assert run.history['loss'].iloc[-1] > 0 and run.episodes[['tp', 'fp', 'fn', 'tn']].sum(axis=1).gt(0).all()
        tables_of[method] = run.path
    both = tables.wide(tables.results(tables_of.values()))
    assert list(both.index) == ['sccan', 'hdmnet', 'hdmnet+pfe+asc'] and 'mean 1-shot' in both                     # on the same episodes, so in one table

"The explorer: what its dials do to numbers, and the notebook in a real browser."
import os, re, shutil, socket, subprocess, sys, time, urllib.request
import numpy as np, pytest, torch
from dataclasses import replace
from cdfss.basics import InputError
from cdfss.diagnostics.frequency import band_filter
from cdfss.diagnostics.subject import open_subject
from cdfss.explore import Dials, ExploreOptions, Explorer, Panel, apm_mask, noisy, picture
from cdfss.methods.lfm import mask_frequencies

SMALL = dict(targets='isic', test_episodes=12)

@pytest.fixture(scope='module')
def explorer(miniature):
    return Explorer(open_subject('ssp+lcm', data_root=str(miniature), size=96, backbone='miniature', shots='1,5', **SMALL))

def test_neutral_dials_are_the_recipe(explorer):
    for dials in (Dials(), Dials(noise=dict.fromkeys(explorer.stages, 0.)), Dials(cutoff=1.2), Dials(lcm=explorer.lcm)):
        view = explorer.look('isic', 5, 3, dials)
        assert np.array_equal(view.mask, view.before) and np.array_equal(view.coarse, view.coarse_before) and view.iou == view.iou_before

@pytest.mark.parametrize('dials', [Dials(noise={'stem': .7}), Dials(amplitude='low'), Dials(phase='high'), Dials(apm=.2)], ids=str)
def test_a_dial_changes_the_scores_the_same_way_each_time(explorer, dials):
    first, again = explorer.look('isic', dials=dials), explorer.look('isic', dials=dials)
    assert not np.array_equal(first.coarse, first.coarse_before) and np.array_equal(first.coarse, again.coarse)
    assert explorer.look('isic').iou == first.iou_before

@pytest.mark.parametrize('n', range(4))
def test_noise_reaches_only_what_lies_behind(explorer, n):
    still, noisy = explorer.look('isic'), explorer.look('isic', dials=Dials(noise={explorer.stages[n]: .5}))
    same = [np.array_equal(still.stages[s], noisy.stages[s]) for s in explorer.stages]
    assert same == [k < n for k in range(len(same))]

def test_noise_has_the_strength_it_says(explorer):
    x = torch.randn(3, 8, 20, 20) + 1
    assert ((noisy(x, .5) - x).square().mean((1, 2, 3))/x.square().mean((1, 2, 3))).sqrt().tolist() == pytest.approx([.5]*3, rel=.05)
    assert noisy(x, 0) is x and torch.equal(noisy(x, .5), noisy(x, .5))

def test_the_mask_is_an_apm_mask():
    x = torch.rand(2, 5, 13, 13)
    zero, half = (apm_mask(g, .4) for g in (1., .5))
    assert torch.equal(mask_frequencies(x, zero, torch.zeros_like(zero)), x)
    halved = mask_frequencies(x, half, torch.zeros_like(half))
    assert torch.allclose(halved, (x + band_filter(x, 'low', 'all', .4))/2, atol=1e-4)

def test_lcm_dials_are_lcm(explorer):
    o = replace(explorer.lcm, k=2, w=1., beta=.9, patch=2)
    view = explorer.look('isic', dials=Dials(lcm=o))
    h, w = view.coarse.shape
    assert view.similarity.shape == (2, -(-h//2), -(-w//2)) and len(view.anchors) == 2
    assert view.similarity[0][view.anchors[0]] == pytest.approx(1, abs=1e-5)
    added = (view.similarity - .9).sum(0).repeat(2, 0).repeat(2, 1)[:h, :w]
    assert np.allclose(view.correction, added, atol=1e-4)

def test_the_picture_has_a_panel_for_everything(explorer):
    one, five = (picture(explorer.look('isic', k), side=48) for k in (1, 5))
    assert one.size == (7*54, 2*72) and five.size == (7*54, 3*72)
    assert one.tobytes() == picture(explorer.look('isic', 1), side=48).tobytes() != picture(explorer.look('isic', 1, 1), side=48).tobytes()

def test_the_panel_follows_its_widgets_and_tells_bad_names():
    with pytest.raises(InputError, match="unknown method 'spp'"): Panel(ExploreOptions(run='spp', **SMALL))
    panel = Panel(ExploreOptions(run='prototype', **SMALL))
    shown = panel.image.value
    for widget, value in ((panel.noise['stage1'], 1.), (panel.lcm['w'], 1.), (panel.episode, 3), (panel.amplitude, 'low')):
        widget.value = value
        assert panel.image.value != shown and panel.note.value.startswith('<b>IoU')
        shown = panel.image.value
    panel.what.value = 'nonsense'
    assert "unknown method 'nonsense'" in panel.note.value and panel.image.value == shown
    panel.what.value = 'ssp'
    assert panel.explorer.subject.name == 'ssp' and panel.noise['stage1'].value == 0

# ---- in the browser ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def chromium():
    found = shutil.which('chromium')
    if found is None:
        why = 'no chromium here: apt-get install chromium'
        if os.environ.get('CDFSS_BROWSER') == 'required': pytest.fail(why)
        pytest.skip(why)
    return found

@pytest.fixture(scope='module')
def lab(repo, tmp_path_factory):
    "JupyterLab on a folder of its own that holds the notebook with small parameters: the address."
    from papermill.iorw import load_notebook_node, write_ipynb
    from papermill.parameterize import parameterize_notebook
    folder, config = tmp_path_factory.mktemp('lab'), tmp_path_factory.mktemp('config')
    write_ipynb(parameterize_notebook(load_notebook_node(str(repo/'nbs'/'explore.ipynb')), SMALL), str(folder/'explore.ipynb'))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    own = {k: str(config/k) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR')}
    options = ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--IdentityProvider.token=', '--ServerApp.password=', f'--ServerApp.root_dir={folder}',
               '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *options], env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(120):
            try: urllib.request.urlopen(address + '/api', timeout=1)
            except OSError: time.sleep(.5)
            else: break
        else: pytest.fail('JupyterLab did not start')
        yield address
    finally:
        server.terminate()
        server.wait(30)

@pytest.mark.slow
def test_in_a_browser(chromium, lab, tmp_path):
    from playwright.sync_api import expect, sync_playwright
    quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
    with sync_playwright() as p:
        page = p.chromium.launch(executable_path=chromium, args=quiet).new_page(viewport=dict(width=1500, height=1300))
        page.set_default_timeout(90_000)
        page.goto(f'{lab}/lab/tree/explore.ipynb?reset')
        page.locator('.jp-NotebookPanel .jp-Cell').first.wait_for()
        page.get_by_text('| Idle').first.wait_for()
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_text('Run All Cells', exact=True).click()
        image, note = page.locator('img.widget-image').first, page.get_by_text('the recipe alone')
        image.wait_for()
        page.locator('.jp-OutputArea-output img:not(.widget-image)').first.wait_for()             # the static picture
        before, said = image.screenshot(), note.inner_text()
        slider = page.locator('.widget-slider', has_text='noise, stem').locator('.noUi-target')
        box = slider.bounding_box()
        page.mouse.click(box['x'] + .6*box['width'], box['y'] + .5*box['height'])
        expect(note).not_to_have_text(said)
        page.wait_for_timeout(500)
        after = image.screenshot()
        folder = os.environ.get('CDFSS_SCREENSHOTS', str(tmp_path))
        page.screenshot(path=f'{folder}/explore.png')
        errors = page.locator('[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"]')
        assert errors.count() == 0, errors.first.inner_text()
        assert after != before and note.inner_text() != said and re.search(r'change [+-]\d', note.inner_text())

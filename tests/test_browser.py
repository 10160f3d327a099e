"The notebooks that are used by hand, in a real browser: JupyterLab in Debian's Chromium."
import contextlib, json, os, re, shutil, socket, subprocess, sys, time, urllib.request
import pytest

EXPLORE = dict(targets='isic', test_episodes=12)

@pytest.fixture(scope='module')
def chromium():
    found = shutil.which('chromium')
    if found is None:
        why = 'no chromium here: apt-get install chromium'
        if os.environ.get('CDFSS_BROWSER') == 'required': pytest.fail(why)
        pytest.skip(why)
    return found

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('lab')

@pytest.fixture(scope='module')
def lab(repo, folder, tmp_path_factory):
    "JupyterLab on a folder of its own that holds the notebooks with small parameters: the address."
    from papermill.iorw import load_notebook_node, write_ipynb
    from papermill.parameterize import parameterize_notebook
    config = tmp_path_factory.mktemp('config')
    for name, given in (('explore', EXPLORE), ('segment', dict(out=str(folder/'out')))):
        write_ipynb(parameterize_notebook(load_notebook_node(str(repo/'nbs'/f'{name}.ipynb')), given), str(folder/f'{name}.ipynb'))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    own = {k: str(config/k) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR')}
    options = ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--IdentityProvider.token=', '--ServerApp.password=', f'--ServerApp.root_dir={folder}',
               '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with open(config/'jupyterlab.log', 'wb') as log: server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *options], env=os.environ | own, stdout=log, stderr=log)
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
        print((config/'jupyterlab.log').read_text()[-4000:])                                        # pytest shows it beside a failure

def opened(page, address):
    "Open a notebook and wait for its kernel. On a busy machine the page's first try to reach the kernel may be lost: it is loaded again then."
    from playwright.sync_api import TimeoutError
    for left in (3, 2, 1, 0):
        page.goto(address)
        try:
            page.locator('.jp-NotebookPanel .jp-Cell').first.wait_for(timeout=60_000)
            return page.get_by_text('| Idle').first.wait_for(timeout=60_000)
        except TimeoutError:
            if not left: raise

BEGUN = [60_000]*4                                                                            # milliseconds for the first cell, at each try

def run_cells(page):
    "Run all cells and wait for the first. A kernel may leave its first requests lying (seen about once in fifty: all cells wait, [*], and it says Idle): it is started again then, as a user would."
    from playwright.sync_api import expect
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    for n, patience in enumerate(BEGUN, 1):
        try: return expect(page.locator('.jp-CodeCell .jp-InputArea-prompt').first).to_have_text(re.compile(r'\[\d+\]'), timeout=patience)
        except AssertionError:
            if n == len(BEGUN): raise
        page.get_by_role('menuitem', name='Kernel', exact=True).click()
        page.get_by_text('Restart Kernel and Run All Cells', exact=False).click()
        page.get_by_role('dialog').get_by_role('button', name='Restart').click()

@contextlib.contextmanager
def run_all(chromium, lab, name, shot):
    "The page of a notebook whose cells are being run; at the end a picture of it is kept, and no cell may have said anything on stderr."
    from playwright.sync_api import sync_playwright
    quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
    with sync_playwright() as p:
        page = p.chromium.launch(executable_path=chromium, args=quiet).new_page(viewport=dict(width=1500, height=1300))
        page.set_default_timeout(180_000)
        try:
            opened(page, f'{lab}/lab/tree/{name}.ipynb?reset')
            run_cells(page)
            yield page
        finally: page.screenshot(path=f"{os.environ.get('CDFSS_SCREENSHOTS', shot)}/{name}.png")
        errors = page.locator('[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"]')
        assert errors.count() == 0, errors.first.inner_text()

@pytest.mark.slow
def test_explorer(chromium, lab, tmp_path):
    from playwright.sync_api import expect
    with run_all(chromium, lab, 'explore', tmp_path) as page:
        image, note = page.locator('img.widget-image').first, page.get_by_text('the recipe alone')
        image.wait_for()
        page.locator('.jp-OutputArea-output img:not(.widget-image)').first.wait_for()             # the static picture
        before, said = image.screenshot(), note.inner_text()
        slider = page.locator('.widget-slider', has_text='noise, stem').locator('.noUi-target')
        box = slider.bounding_box()
        page.mouse.click(box['x'] + .6*box['width'], box['y'] + .5*box['height'])
        expect(note).not_to_have_text(said)
        page.wait_for_timeout(500)
        assert image.screenshot() != before and note.inner_text() != said and re.search(r'change [+-]\d', note.inner_text())

@pytest.mark.slow
def test_board(chromium, lab, folder, tmp_path):
    with run_all(chromium, lab, 'segment', tmp_path) as page:
        page.locator('canvas[data-board]').wait_for()
        page.get_by_role('button', name='segment', exact=True).click()
        page.get_by_text('nothing is drawn yet').wait_for()
        page.get_by_role('button', name='box', exact=True).click()
        page.locator('canvas[data-tool=box]').wait_for()
        canvas = page.locator('canvas[data-board]')
        canvas.scroll_into_view_if_needed()
        at = canvas.bounding_box()
        x, y = (lambda f: at['x'] + f*at['width']), (lambda f: at['y'] + f*at['height'])
        page.mouse.move(x(.25), y(.25)); page.mouse.down(); page.mouse.move(x(.5), y(.6)); page.mouse.move(x(.75), y(.75)); page.mouse.up()
        page.get_by_text('1 of 15 pictures are drawn on').wait_for()
        page.get_by_role('button', name='segment', exact=True).click()
        page.get_by_text('on 1 drawn pictures').wait_for()
        assert page.locator('img.widget-image').count() == 15
        page.get_by_role('button', name='save', exact=True).click()
        page.get_by_text('fitted.safetensors are in').wait_for()
    assert len(list((folder/'out').glob('*.png'))) == 15 and len(json.loads((folder/'out'/'annotations.json').read_text())['images']) == 15

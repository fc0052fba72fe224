/** `<tempo-run>`: on a page of its own, as `tempo-mlx show RUN.json --html` writes it, and on pages of other people. */

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { tmpdir } from 'node:os'
import { after, before, test } from 'node:test'
import { assertAccessible, assertFits, closePage, launch, meter, openPage, ROOT, WEB } from './browser.mjs'
import { capital, large } from './runs.mjs'
import { PYTHON } from './server.mjs'

const folder = mkdtempSync(`${tmpdir()}/tempo-`)
let browser

before(async () => (browser = await launch()))
after(async () => {
  await browser.close()
  rmSync(folder, { recursive: true })
})

const WRITE = `import sys
from tempo_mlx.report.html import to_html
from tempo_mlx.report.phrases import Alternative, Phrase
fork = Phrase('Paris', 0.7, (Alternative('Rome', 0.2, (), ', they say'),), 0, 1)
sys.stdout.write(to_html(sys.stdin.read(), [fork] if sys.argv[1:] else []))`

function write(name, run, ...forked) {
  const html = execFileSync(PYTHON, ['-c', WRITE, ...forked], {
    cwd: ROOT,
    input: JSON.stringify(run),
    maxBuffer: 2 ** 26,
  })
  writeFileSync(`${folder}/${name}.html`, html)
  return `file://${folder}/${name}.html`
}

test('shows a 200-step run within a second, without any request', async () => {
  const page = await openPage(browser, null, { offline: true })
  const requests = []
  page.on('request', (request) => requests.push(request.url()))
  const url = write('long', large(200, 8))
  await page.goto('about:blank')
  const worked = await meter(page)
  await page.goto(url)
  await page.getByText(/200 steps/).waitFor()
  const shown = await worked('TaskDuration')
  console.log(`# shown after ${shown.toFixed(0)} ms of work`)
  assert.ok(shown > 0 && shown < 1000, `${shown} ms`)
  assert.deepEqual(requests.filter((r) => !r.startsWith('blob:')).slice(1), [url].slice(1))
  await closePage(page)
})

test('offers nothing that needs a server, and everything else', async () => {
  const page = await openPage(browser, write('short', capital()), { offline: true })
  assert.equal(await page.getByRole('button', { name: 'Generate' }).count(), 0)
  assert.match(
    await page.getByRole('group', { name: 'Text, sets' }).innerText(),
    /^The capital of France is Paris\[\.\/·for\/·as\]/,
  )
  await page.getByRole('application').focus()
  await page.keyboard.press('Home')
  await page.keyboard.press('ArrowDown')
  const inspector = page.getByRole('complementary')
  await inspector.getByText('posterior 0.04 is under 0.1').waitFor()
  assert.equal(await inspector.getByRole('button', { name: 'Branch here' }).count(), 0)
  await assertAccessible(page, 'standalone')
  await closePage(page)
})

test('shows phrases first, each fork with its shares', async () => {
  const page = await openPage(browser, write('phrases', capital(), 'forked'), { offline: true })
  const text = page.getByRole('group', { name: 'Text, phrases' })
  assert.match(await text.innerText(), /is\s?Paris\s*$/)
  await text.getByRole('button', { name: 'Paris' }).click()
  const card = page.getByRole('dialog', { name: 'What it says here' })
  assert.match(await card.innerText(), /Paris\s+70%[^]*Rome\s+20%\s+… , they say …/)
  assert.ok(await card.getByRole('button', { name: /Rome/ }).isDisabled(), 'there is no server to go on with')
  await assertAccessible(page, 'phrases')
  await page.keyboard.press('Escape')
  await page.getByRole('button', { name: 'View ▾' }).press('Enter')
  await page.locator('[role=menuitemradio]:focus').waitFor()
  for (let down = 0; down < 3; down++) await page.keyboard.press('ArrowDown')
  await page.keyboard.press('Enter')
  assert.match(await text.innerText(), /Paris\/Rome\s*$/)
  await page.getByRole('radio', { name: 'Phrases' }).focus()
  await page.keyboard.press('ArrowLeft')
  await page.getByRole('group', { name: 'Text, sets' }).waitFor()
  await closePage(page)
})

test('a damaged file says so', async () => {
  const page = await openPage(browser, write('damaged', { format: 'other' }), { offline: true })
  assert.match(await page.getByRole('alert').innerText(), /no run file/)
  await closePage(page)
})

/** A blog: its own styles, which must not reach the element, and a policy that lets nothing in but the element's file. */
async function blog(t, elements, files = {}) {
  const policy = `default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'sha256-${BLOG_HASH}'`
  const body = `<!doctype html><html lang="en"><head><title>A blog</title><meta charset="utf-8"><style>${BLOG}</style>
    <script src="tempo-run.js"></script></head><body><main><h1>A story</h1>${elements}</main></body></html>`
  const server = createServer((request, response) => {
    const name = request.url.slice(1)
    if (name === '')
      response.writeHead(200, { 'content-type': 'text/html', 'content-security-policy': policy }).end(body)
    else if (name === 'tempo-run.js') response.end(readFileSync(SCRIPT))
    else if (name in files) response.end(JSON.stringify(files[name]))
    else response.writeHead(404).end()
  })
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
  t.after(() => server.close())
  return `http://127.0.0.1:${server.address().port}/`
}

const SCRIPT = `${WEB}dist/tempo-run.js`
const BLOG = 'body { font-family: serif; max-width: 760px; margin: auto } button { display: none } p { color: red }'
const BLOG_HASH = createHash('sha256').update(BLOG).digest('base64')
const ANSWERS = {
  question: 'What is the capital of Australia?',
  answers: [
    { text: 'Canberra', lower: 0.7, upper: 0.75, estimate: null, texts: [{ text: 'Canberra.', logprob: -0.4 }] },
    { text: 'Sydney', lower: 0.2, upper: 0.25, estimate: null, texts: [{ text: 'Sydney', logprob: -1.6 }] },
  ],
  not_looked_at: 0.05,
  decided: true,
  run: null,
}
const EXAMPLE = JSON.parse(readFileSync(`${WEB}public/example.json`, 'utf8'))

test('on a blog it fetches its src and nothing else, keeps to itself, and opens forks and the lattice', async (t) => {
  const url = await blog(t, '<tempo-run src="story.json" theme="light"></tempo-run>', { 'story.json': EXAMPLE })
  const page = await openPage(browser, null)
  const requests = []
  page.on('request', (request) => requests.push(request.url()))
  await page.goto(url)
  const fork = page.locator('.text.body .fork').first()
  await fork.focus()
  await page.keyboard.press('Enter')
  const card = page.getByRole('dialog', { name: 'What it says here' })
  await card.waitFor()
  await assertAccessible(page, 'an open fork on a blog')
  assert.ok(await card.locator('.main').nth(1).isDisabled(), 'there is nothing to go on with')
  await card.getByRole('button', { name: 'Look into it' }).nth(1).click()
  await page.getByRole('complementary').getByText('Where it comes from').waitFor()
  const folded = page.getByRole('region', { name: 'Lattice, folded' })
  await folded.getByRole('button', { name: 'Full lattice' }).click()
  await page.getByRole('application').waitFor()
  assert.equal(await page.getByRole('tablist').count(), 0, 'no charts in the midst of a text')
  assert.deepEqual(requests.map((r) => r.slice(url.length)), ['', 'tempo-run.js', 'story.json']) // prettier-ignore
  assert.equal(await page.title(), 'A blog')
  await assertAccessible(page, 'a run on a blog')
  for (const width of [380, 1440]) {
    await page.setViewportSize({ width, height: 800 })
    await assertFits(page, `a blog, ${width} px`)
  }
  await closePage(page)
})

test('it follows the theme it is given, and the system where it is given none', async (t) => {
  const url = await blog(t, '<tempo-run src="run.json"></tempo-run>', { 'run.json': capital() })
  const page = await openPage(browser, url, { colorScheme: 'dark' })
  const viewer = page.locator('.viewer')
  const theme = () => viewer.getAttribute('data-theme')
  await page.getByRole('application').waitFor()
  assert.equal(await theme(), 'dark')
  await assertAccessible(page, 'a dark run on a blog')
  const ground = () => page.locator('.panel').first().evaluate((element) => getComputedStyle(element).backgroundColor) // prettier-ignore
  const night = await ground()
  await page.locator('tempo-run').evaluate((element) => element.setAttribute('theme', 'light'))
  assert.equal(await theme(), 'light')
  assert.notEqual(await ground(), night)
  await page.emulateMedia({ colorScheme: 'light' })
  await page.locator('tempo-run').evaluate((element) => element.setAttribute('theme', 'auto'))
  assert.equal(await theme(), 'light')
  await closePage(page)
})

test('answers are bars that open their texts; what cannot be read says so', async (t) => {
  const elements =
    '<tempo-run src="ask.json"></tempo-run><tempo-run src="gone.json"></tempo-run><tempo-run></tempo-run>'
  const url = await blog(t, elements, { 'ask.json': ANSWERS })
  const page = await openPage(browser, url, { expected: [/404/] })
  await page.getByText('70% to 75%').waitFor()
  await page.locator('summary').first().focus()
  await page.keyboard.press('Enter')
  await page.getByText('Canberra.', { exact: true }).waitFor()
  await page.getByText('Nothing that was not looked at').waitFor()
  const said = await page.getByRole('alert').allInnerTexts()
  assert.match(said.join(), /gone\.json cannot be read: 404.*give src, or put the JSON/s)
  await assertAccessible(page, 'answers on a blog')
  await page.setViewportSize({ width: 380, height: 800 })
  await assertFits(page, 'answers at 380 px')
  await closePage(page)
})

test('a fork in an address, or in the name of a language, spoils neither', async (t) => {
  const said = [['See [the guide](https://example.com/'], ['guide', 'manual'], [') or '], ['https://example.com/'], ['a', 'b'], ['\n\n```'], ['python', 'ruby'], ['\nprint(1)\n```\n']] // prettier-ignore
  const phrases = said.map(([text, other], at) => ({
    text,
    share: other ? 0.6 : null,
    alternatives: other ? [{ text: other, share: 0.4, slots: [], follows: '' }] : [],
    start: at,
    end: at + 1,
  }))
  const run = { ...capital(), final_text: said.map(([text]) => text).join('') }
  const page = await openPage(browser, await blog(t, '<tempo-run src="x.json"></tempo-run>', { 'x.json': { run, phrases } })) // prettier-ignore
  const text = page.locator('.markdown')
  await text.waitFor()
  assert.deepEqual(await text.locator('a').evaluateAll((all) => all.map((a) => a.getAttribute('href'))), [
    'https://example.com/guide',
    'https://example.com/a',
  ])
  assert.equal(await text.locator('pre').innerText(), 'print(1)\n')
  assert.equal((await text.innerText()).trim(), 'See the guide or https://example.com/a\n\nprint(1)')
  await closePage(page)
})

test('nothing of the page around it reaches the text, nor a file that came too late', async (t) => {
  const url = await blog(t, '<tempo-run></tempo-run>', { 'run.json': capital() })
  const page = await openPage(browser, url, { expected: [/404/] })
  await page.route(/slow/, async (route) => {
    await new Promise((resolve) => setTimeout(resolve, 500))
    await route.fulfill({ status: 404 })
  })
  await page.locator('tempo-run').evaluate((element) => {
    const hostile = { textTransform: 'uppercase', textAlign: 'center', letterSpacing: '9px', whiteSpace: 'pre', direction: 'rtl' } // prettier-ignore
    Object.assign(document.body.style, hostile)
    element.setAttribute('src', 'slow.json')
    element.setAttribute('src', 'run.json')
  })
  const text = page.getByRole('group', { name: 'Text, sets' })
  await text.waitFor()
  assert.match(await text.innerText(), /^The capital of France is Paris/)
  const style = await text.evaluate((element) => {
    const { textAlign, letterSpacing, direction } = getComputedStyle(element)
    return [textAlign, letterSpacing, direction]
  })
  assert.deepEqual(style, ['start', 'normal', 'ltr'])
  await page.waitForTimeout(1000)
  assert.equal(await page.getByRole('alert').count(), 0)
  await closePage(page)
})

test('from disk it shows what is inside it, wherever its script stands', async () => {
  const inside = `<script type="application/json">${JSON.stringify(EXAMPLE).replaceAll('<', '\\u003c')}</script>`
  const html = `<!doctype html><script src="${SCRIPT}"></script><tempo-run>${inside}</tempo-run><tempo-run src="x.json">`
  writeFileSync(`${folder}/blog.html`, html)
  const page = await openPage(browser, `file://${folder}/blog.html`, { offline: true, expected: [/x\.json|ERR_|CORS/] })
  await page.locator('.text.body .fork').first().waitFor()
  await page.getByRole('alert').getByText('A page opened from disk needs the run inside it.').waitFor()
  await closePage(page)
})

/** A run as one HTML file, as `tempo-mlx show RUN.json --format html` writes it, opened from disk. */

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { after, before, test } from 'node:test'
import { assertAccessible, closePage, launch, openPage, ROOT } from './browser.mjs'
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
  await page.goto(url)
  await page.getByText('200 steps', { exact: true }).waitFor()
  const shown = await page.evaluate(
    () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(() => resolve(performance.now())))),
  )
  console.log(`# shown after ${shown.toFixed(0)} ms`)
  assert.ok(shown < 1000, `${shown} ms`)
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

test('can be saved again from itself, with another run dropped onto it', async () => {
  const page = await openPage(browser, write('again', capital(), 'forked'), { offline: true })
  await page.getByLabel('Run files').setInputFiles({
    name: 'x.json',
    mimeType: 'application/json',
    buffer: Buffer.from(JSON.stringify(large(7, 3))),
  })
  await page.getByText('7 steps', { exact: true }).waitFor()
  await page.getByRole('button', { name: 'Export' }).click()
  const [saved] = await Promise.all([
    page.waitForEvent('download'),
    page.getByRole('menuitem', { name: 'This viewer' }).click(),
  ])
  await saved.saveAs(`${folder}/saved.html`)
  await page.goto(`file://${folder}/saved.html`)
  await page.getByText('7 steps', { exact: true }).waitFor()
  const run = readFileSync(`${folder}/saved.html`, 'utf8').match(/id="run">([^<]*)</)[1]
  assert.deepEqual(JSON.parse(run), large(7, 3))
  assert.equal(await page.getByRole('radio', { name: 'Phrases' }).count(), 0, 'the phrases of another run')
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
  await page.getByLabel('alternatives').check()
  assert.match(await text.innerText(), /Paris\/Rome\s*$/)
  await page.getByRole('radio', { name: 'Phrases' }).focus()
  await page.keyboard.press('ArrowLeft')
  await page.getByRole('group', { name: 'Text, sets' }).waitFor()
  await closePage(page)
})

test('a damaged file says so', async () => {
  const page = await openPage(browser, write('damaged', { format: 'other' }), { expected: [/run file/] })
  assert.match(await page.locator('body').innerText(), /no run file/)
  await closePage(page)
})

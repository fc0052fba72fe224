/** Who comes for the first time, and whatever files they bring. The real server and model. */

import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { assertAccessible, assertFits, closePage, launch, openPage } from './browser.mjs'
import { capital, large } from './runs.mjs'
import { startServer } from './server.mjs'

let browser
let server

before(async () => {
  browser = await launch()
  server = await startServer()
})
after(async () => {
  await browser?.close()
  await server?.stop()
})

const text = (page) => page.getByRole('group', { name: /^Text, / })
const idle = (page) => page.locator('button.primary:enabled', { hasText: 'Generate' }).waitFor()

function open(page, run) {
  const buffer = Buffer.from(JSON.stringify(run))
  return page.getByLabel('Run files').setInputFiles({ name: 'run.json', mimeType: 'application/json', buffer })
}

test('a first visit begins with a finished run in view, on a phone and at 200 % zoom', async () => {
  for (const viewport of [
    { width: 380, height: 760 },
    { width: 720, height: 450 },
    { width: 1440, height: 900 },
  ]) {
    const page = await openPage(browser, server.url, { viewport })
    const fork = page.locator('.fork').first()
    await fork.waitFor()
    const words = await text(page).boundingBox()
    assert.ok(words.y < viewport.height - 60, `the text begins at ${words.y} of ${viewport.height} px`)
    await assertFits(page, `first visit, ${viewport.width} px`)
    await assertAccessible(page, `first visit, ${viewport.width} px`)
    await closePage(page)
  }
})

test('whoever comes for the first time takes another word: by mouse, or by a few keys from the top of the page', async () => {
  const page = await openPage(browser, server.url)
  const card = page.locator('.fork-card:popover-open')
  const texts = page.getByRole('navigation', { name: 'Texts from here' })
  await page.locator('.fork').first().waitFor()
  await page.keyboard.press('Tab')
  assert.equal(await page.evaluate(() => document.activeElement.textContent), 'To the text')
  await assertAccessible(page, 'the way to the text')
  await page.keyboard.press('Enter')
  await page.keyboard.press('Enter')
  await card.waitFor()
  await page.keyboard.press('ArrowDown')
  const word = await card.locator('.word').nth(1).innerText()
  await page.keyboard.press('Enter')
  await texts.getByRole('button', { name: `with ${word}` }).waitFor()
  await idle(page)
  const focused = () => page.evaluate(() => document.activeElement.matches('.text'))
  assert.ok(await focused(), 'one goes on reading where one was')
  await page.keyboard.press('t')
  assert.ok(await page.evaluate(() => document.activeElement.matches('.fork')))

  await page.locator('.fork').nth(2).click()
  await card.locator('.main').nth(1).click()
  await texts.getByRole('button').nth(2).waitFor()
  await idle(page)
  assert.equal(await page.getByRole('alert').count(), 0)
  await closePage(page)
})

test('boxes are as high as what is in them; on a phone what is rarely needed is in a menu', async () => {
  const page = await openPage(browser, server.url)
  await page.locator('.fork').first().waitFor()
  await open(page, capital())
  await text(page).getByText('The capital of France is').waitFor()
  const height = async (box) => (await box.boundingBox()).height
  assert.ok((await height(text(page))) < 100, `${await height(text(page))} px for one line of text`)
  const prompt = page.getByLabel('Prompt', { exact: true })
  await prompt.fill('a line\n'.repeat(8))
  assert.ok((await height(prompt)) > 180)
  await prompt.fill('a line')
  assert.ok((await height(prompt)) < 80)

  await page.setViewportSize({ width: 380, height: 760 })
  for (const bar of ['.top', '.runbar', '.bar.reading']) {
    assert.ok((await height(page.locator(bar))) < 50, `${bar} is one line`)
  }
  await page.getByRole('button', { name: 'Find tokens' }).click()
  await page.keyboard.type('Paris')
  await page.keyboard.press('Enter')
  await page.getByRole('complementary', { name: /Paris/ }).waitFor()
  assert.ok((await height(page.locator('.runbar'))) < 50, 'it still is where one looks for tokens')
  await assertAccessible(page, 'looking for tokens on a phone')
  await page.getByRole('button', { name: 'More ▾' }).click()
  await assertAccessible(page, 'the menu of a phone')
  await assertFits(page, 'the menu of a phone')
  await page.evaluate(() => document.querySelector('main').dispatchEvent(new Event('scroll'))) // it may come late
  await page.getByRole('menuitem', { name: 'Your runs' }).click()
  await page.getByRole('dialog', { name: 'Your runs' }).waitFor()
  await closePage(page)
})

test('on a wide screen there is something beside the text', async () => {
  const page = await openPage(browser, server.url, { viewport: { width: 2560, height: 1300 } })
  await page.locator('.fork').first().waitFor()
  await open(page, capital())
  await text(page).getByText('The capital of France is').waitFor()
  const [words, charts, lattice] = await Promise.all(
    [text(page), page.getByRole('region', { name: 'Charts' }), page.getByRole('region', { name: 'Lattice' })].map(
      (part) => part.boundingBox(),
    ),
  )
  assert.ok(charts.x > words.x + words.width && charts.x + charts.width > 2500, 'charts beside the text, to the edge')
  assert.ok(lattice.y > words.y + words.height && lattice.width > 2000, 'the lattice below both')
  await assertAccessible(page, 'a wide screen')
  await closePage(page)
})

test('a long run begins folded to where its readings part, and the whole lattice is one key away', async () => {
  const page = await openPage(browser, server.url)
  const folded = page.getByRole('region', { name: 'Lattice, folded' })
  await folded.waitFor()
  const forks = await page.locator('.text.body .fork').count()
  assert.equal(await folded.locator('.stack').count(), forks)
  const box = await folded.boundingBox()
  assert.ok(box.height < 900, `${box.height} px`)
  await folded.locator('.stack').nth(1).click()
  const card = page.getByRole('dialog', { name: 'What it says here' })
  await card.getByRole('button', { name: 'Look into it' }).nth(1).click()
  await page.getByRole('complementary').getByText('Where it comes from').waitFor()
  await folded.locator('.row.selected').waitFor()
  await assertAccessible(page, 'folded')
  await page.keyboard.press('l')
  await page.getByRole('application').waitFor()
  for (let out = 0; out < 12 && (await folded.count()) === 0; out++) {
    await page.getByRole('button', { name: 'Zoom out' }).click()
  }
  await folded.waitFor() // it never becomes too small to be read
  await closePage(page)
})

/** A run of 300 steps with 60 forks, each with three alternatives. */
function long() {
  const run = large(300, 4)
  const word = (step, rank) => run.steps[step].tokens[Math.min(rank, run.steps[step].tokens.length - 1)]
  const phrases = Array.from({ length: 60 }, (_, fork) => {
    const at = 5 * fork
    const other = (rank) => ({ text: word(at, rank).text, share: 0.2, slots: [word(at, rank).slot], follows: '' })
    const sure = [1, 2, 3, 4].map((further) => word(at + further, 0).text).join('')
    return [
      { text: word(at, 0).text, share: 0.4, alternatives: [1, 2, 3].map(other), start: at, end: at + 1 },
      { text: sure, share: null, alternatives: [], start: at + 1, end: at + 5 },
    ]
  })
  return { run, phrases: phrases.flat() }
}

test('300 steps with 60 forks are seen at once when folded; charts that would be flat are a sentence', async () => {
  for (const viewport of [
    { width: 1440, height: 900 },
    { width: 2560, height: 1440 },
  ]) {
    const page = await openPage(browser, server.url, { viewport })
    await page.locator('.fork').first().waitFor()
    await open(page, long())
    await page.getByText('300 steps', { exact: true }).waitFor()
    const folded = page.getByRole('region', { name: 'Lattice, folded' })
    assert.equal(await folded.locator('.stack').count(), 60)
    const { height } = await folded.boundingBox()
    assert.ok(height <= viewport.height, `${height} px`)
    const [content, seen] = await folded.locator('.flow').evaluate((box) => [box.scrollHeight, box.clientHeight])
    assert.ok(content <= seen, `${content} px of lattice in ${seen} px`)
    const inspect = page.getByRole('region', { name: viewport.width > 2000 ? 'Charts' : 'Inspect' })
    await inspect.getByText('Threshold 0.1 at every step.').waitFor()
    assert.equal(await inspect.getByRole('figure').count(), 3)
    await inspect.locator('.unsure button').first().click()
    await page.getByRole('complementary').waitFor()
    if (viewport.width > 2000) {
      const [words, right] = [await text(page).boundingBox(), await folded.boundingBox()]
      assert.ok(right.x > words.x + words.width && right.x + right.width > 2000, 'beside the text, to the edge')
      assert.ok((await inspect.boundingBox()).y < viewport.height, 'charts are in view')
    }
    await assertAccessible(page, `300 steps at ${viewport.width} px`)
    await closePage(page)
  }
})

test('what has no phrases is never made too small to be read either', async () => {
  const page = await openPage(browser, server.url, { expected: [/4\d\d/] })
  await page.locator('.fork').first().waitFor()
  await open(page, { ...large(300, 4), decoder: 'tree' })
  const lattice = page.getByRole('region', { name: 'Lattice', exact: true })
  await lattice.getByRole('button', { name: 'Show all' }).click()
  for (let out = 0; out < 12; out++) await lattice.getByRole('button', { name: 'Zoom out' }).click()
  // Half of life size: the window on the map is at least as wide as half the columns that would fit at full size.
  const share = await lattice.locator('.map span').evaluate((box) => parseFloat(box.style.width))
  assert.ok(share < 25, `${share} % of 300 steps in sight`)
  await closePage(page)
})

test('a token of 20,000 characters, and one that turns the line around, are shown like any other', async () => {
  const page = await openPage(browser, server.url)
  await page.locator('.fork').first().waitFor()
  const run = capital()
  run.steps[0].tokens[0].text = 'x'.repeat(20_000)
  run.steps[1].tokens[1].text = 'abc\u202Edcba'
  run.steps[1].tokens[2].text = '\u200D'
  await open(page, run)
  const began = Date.now()
  await page.getByText('3 steps', { exact: true }).waitFor()
  await page.getByRole('radio', { name: 'Sets' }).click()
  await text(page).getByText('‹RLO›').first().waitFor()
  await text(page).getByText('‹ZWJ›').first().waitFor()
  await page.getByRole('application').focus()
  await page.keyboard.press('Home')
  await page.getByRole('complementary').waitFor()
  assert.ok(Date.now() - began < 15_000, `it took ${Date.now() - began} ms`)
  await assertFits(page, 'a token of 20,000 characters')
  await closePage(page)
})

test('opening a run fills the form with what asked for it', async () => {
  const page = await openPage(browser, server.url)
  await page.locator('.fork').first().waitFor()
  const run = capital()
  run.config = { threshold: 0.2, seed: 7, max_tokens: 3 }
  await open(page, run)
  await page.getByText('3 steps', { exact: true }).waitFor()
  assert.equal(await page.getByLabel('Prompt', { exact: true }).inputValue(), run.prompt.text)
  assert.equal(await page.getByLabel('threshold', { exact: true }).inputValue(), '0.2')
  assert.equal(await page.getByLabel('seed', { exact: true }).inputValue(), '7')
  await closePage(page)
})

test('what is asked for is what is run: branches make a tree, by a link or by the arrow keys', async () => {
  const page = await openPage(browser, `${server.url}/#prompt=Hello&branches=3&max_tokens=4`)
  const generate = page.getByRole('button', { name: 'Generate', exact: true })
  const [request] = await Promise.all([page.waitForRequest((r) => r.method() === 'POST'), generate.click()])
  assert.match(request.url(), /generate\/stream$/)
  await idle(page)
  await page.getByRole('radio', { name: /^Branches \(\d\)$/ }).waitFor()
  await page.getByRole('radio', { name: 'Lineage' }).click()
  await page.keyboard.press('ArrowRight')
  assert.equal(await page.getByRole('radio', { name: 'Original TEMPO' }).getAttribute('aria-checked'), 'true')
  assert.equal(await page.getByText(/--[a-z]/).count(), 0, 'the command line is spelled somewhere')
  await closePage(page)
})

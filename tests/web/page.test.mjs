/** The page in Chromium, against the real server with the real model. */

import assert from 'node:assert/strict'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { after, before, test } from 'node:test'
import { assertAccessible, assertFits, closePage, drop, grown, launch, openPage } from './browser.mjs'
import { startServer } from './server.mjs'

const folder = mkdtempSync(`${tmpdir()}/tempo-`)
let browser
let server

before(async () => {
  browser = await launch()
  server = await startServer('--concurrency', '1', '--queue-size', '1')
})
after(async () => {
  await browser?.close()
  await server?.stop()
  rmSync(folder, { recursive: true })
})

const link = (settings) => `${server.url}/#${new URLSearchParams({ prompt: 'The capital of France is', ...settings })}`
const button = (page, name) => page.getByRole('button', { name, exact: true })
const text = (page) => page.getByRole('group', { name: /^Text, / })
const inspector = (page) => page.getByRole('complementary')

async function idle(page) {
  await page.locator('button.primary:enabled', { hasText: 'Generate' }).waitFor()
}

async function generate(page) {
  await button(page, 'Generate').click()
  await page.getByText(/^[1-9]\d* steps?$/).waitFor()
  await idle(page)
}

/** The view of every member, position by position. */
const sets = (page) => page.getByRole('radio', { name: 'Sets' }).click()

/** A request that keeps the server busy until it is cancelled. */
function occupy(id) {
  const body = JSON.stringify({ prompt: 'Once upon a time', max_tokens: 2000, min_steps: 2000, threshold: 1 })
  const headers = { 'content-type': 'application/json', 'x-request-id': id }
  const answer = fetch(`${server.url}/generate`, { method: 'POST', body, headers }).catch(() => null)
  return async () => {
    await fetch(`${server.url}/requests/${id}`, { method: 'DELETE' })
    await (await answer)?.text()
  }
}

async function until(condition, what) {
  for (let tries = 0; tries < 400; tries++) {
    if (await condition()) return
    await new Promise((resolve) => setTimeout(resolve, 250))
  }
  assert.fail(`never came: ${what}`)
}

const health = async () => (await fetch(`${server.url}/health`)).json()

test('a first visit: one click gives a result, and it can be stopped', async () => {
  const page = await openPage(browser, server.url)
  await button(page, 'Generate').click()
  await text(page).getByText(/Paris/).first().waitFor()
  await button(page, 'Stop').first().click()
  await idle(page)
  assert.match(await text(page).innerText(), /^The capital of France is.*Paris/s)
  await page.getByText(/^(stopped|can go on)$/).waitFor()
  await assertAccessible(page, 'after a run')
  await closePage(page)
})

test('settings live in the address', async () => {
  const page = await openPage(browser, server.url)
  await page.getByRole('radio', { name: 'Original TEMPO' }).click()
  await page.getByLabel('threshold', { exact: true }).fill('0.25')
  await page.getByLabel('max tokens', { exact: true }).fill('7')
  await page.getByLabel('stop', { exact: true }).fill('a & b\nc')
  await page.getByLabel('Prompt', { exact: true }).fill('50% of "all" #tags &\nmore')
  await page.waitForFunction(() => location.hash.includes('more'))
  const address = page.url()
  assert.match(address, /seed=42/)
  const sent = []
  for (const url of [null, address]) {
    if (url) await page.goto('about:blank').then(() => page.goto(url))
    const [request] = await Promise.all([
      page.waitForRequest((r) => r.method() === 'POST'),
      button(page, 'Generate').click(),
    ])
    sent.push(request.postDataJSON())
    await idle(page)
  }
  assert.deepEqual(sent[1], sent[0])
  assert.deepEqual(sent[0], {
    prompt: '50% of "all" #tags &\nmore', preset: 'original', threshold: 0.25, max_tokens: 7, stop: ['a & b', 'c'], steps: 0,
  }) // prettier-ignore
  await closePage(page)
})

test('a member can be looked into, pinned, removed and branched from; all of it can be undone', async () => {
  const page = await openPage(browser, link({ max_tokens: 5, threshold: 0.05 }), { expected: [/404|410/] })
  await generate(page)
  await sets(page)
  const before = await text(page).innerText()
  const second = page.locator('.set .t').nth(1)
  const word = await second.innerText()
  await second.click()
  await inspector(page).getByText('What it would say next').waitFor()
  assert.equal(await inspector(page).locator('.next li').count(), 20)
  await assertAccessible(page, 'inspecting')

  await button(page, 'Pin').click()
  await button(page, 'Unpin').waitFor()
  await idle(page)
  assert.ok(await button(page, 'Remove').isDisabled())
  await button(page, 'Unpin').click()
  await button(page, 'Pin').waitFor()
  await idle(page)
  await button(page, 'Remove').click()
  await inspector(page)
    .getByText(/^Removed/)
    .waitFor()
  assert.notEqual(await text(page).innerText(), before)

  await page.getByRole('button', { name: /^Undo/ }).click()
  await inspector(page)
    .getByText(/threshold/)
    .waitFor()
  await idle(page)
  assert.equal(await text(page).innerText(), before)

  await button(page, 'Branch here').click()
  await page.waitForFunction((was) => document.querySelector('.text.body').innerText.length < was, before.length)
  await idle(page)
  assert.ok((await text(page).innerText()).trimEnd().endsWith(word.trim()))
  await page.getByLabel('Steps to continue').fill('2')
  const steps = Number((await page.getByText(/^\d+ steps?$/).innerText()).split(' ')[0])
  await button(page, 'Continue').click()
  await page.getByText(`${steps + 2} steps`, { exact: true }).waitFor()
  await idle(page)

  const [, id] = (
    await page.evaluate(() =>
      performance
        .getEntriesByType('resource')
        .map((r) => r.name)
        .join(),
    )
  ).match(/sessions\/([\w-]+)\/continue/)
  const branched = await text(page).innerText()
  for (let undone = 0; undone < 2; undone++) {
    await page.getByRole('button', { name: /^Undo/ }).click()
    await idle(page)
  }
  assert.equal(await text(page).innerText(), before)
  for (let redone = 0; redone < 2; redone++) {
    await page.getByRole('button', { name: /^Redo/ }).click()
    await idle(page)
  }
  assert.equal(await text(page).innerText(), branched)

  // A session that the server has dropped is opened again from the run on the page.
  await fetch(`${server.url}/sessions/${id}`, { method: 'DELETE' })
  await page.locator('.t').last().click()
  await inspector(page).getByText('What it would say next').waitFor()
  await idle(page)
  assert.equal(await text(page).innerText(), branched)
  await closePage(page)
})

test('the keyboard alone is enough', async () => {
  const page = await openPage(browser, link({ max_tokens: 4, threshold: 0.05 }))
  await page.getByLabel('Prompt', { exact: true }).focus()
  await page.keyboard.press('Control+Enter')
  await page.getByText('4 steps', { exact: true }).waitFor()
  await idle(page)
  await page.getByRole('application').focus()
  await page.keyboard.press('Home')
  await page.keyboard.press('ArrowRight')
  assert.match(await inspector(page).getAttribute('aria-label'), /step 1\.?$/)
  await page.keyboard.press('b')
  await page.getByText('2 steps', { exact: true }).waitFor()
  await idle(page)
  await page.keyboard.press('u')
  await page.getByText('4 steps', { exact: true }).waitFor()
  await page.keyboard.press('Escape')
  assert.equal(await inspector(page).count(), 0)
  await page.keyboard.press('?')
  await page.getByRole('dialog').waitFor()
  await page.keyboard.press('Escape')
  await closePage(page)
})

test('runs are exported, dropped back in, compared, and opened on the server', async () => {
  const page = await openPage(browser, link({ max_tokens: 4, threshold: 0.05 }))
  await generate(page)
  const saved = {}
  for (const [item, kind] of [
    ['Run file', 'json'],
    ['Lattice SVG', 'svg'],
    ['Lattice PNG', 'png'],
    ['This viewer', 'html'],
  ]) {
    await button(page, 'Export ▾').click()
    const [file] = await Promise.all([
      page.waitForEvent('download'),
      page.getByRole('menuitem', { name: item }).click(),
    ])
    assert.equal(file.suggestedFilename(), `the-capital-of-france-is.${kind}`)
    await file.saveAs(`${folder}/run.${kind}`)
    saved[kind] = readFileSync(`${folder}/run.${kind}`)
  }
  const run = JSON.parse(saved.json)
  assert.equal(run.steps.length, 4)
  assert.match(saved.svg.toString(), /^<svg [^]*Paris[^]*<\/svg>\n$/)
  assert.equal(saved.png.subarray(1, 4).toString(), 'PNG')
  assert.ok(saved.html.toString().includes(saved.json.toString().replaceAll('<', '\\u003c')))
  const phrases = await text(page).innerText()
  await closePage(page)

  const alone = await openPage(browser, `file://${folder}/run.html`, { offline: true })
  await alone.locator('.text.body').waitFor()
  assert.equal(await text(alone).innerText(), phrases)
  await closePage(alone)

  const other = await openPage(browser, server.url)
  await button(other, 'Generate').waitFor()
  await drop(other, 'run.json', saved.json.toString())
  await other.getByText('4 steps', { exact: true }).waitFor()
  assert.equal(await text(other).innerText(), phrases)
  await drop(other, 'second.json', JSON.stringify({ ...run, config: { ...run.config, seed: 7 } }))
  await other.getByLabel('beside').selectOption({ index: 1 })
  const differences = other.getByRole('region', { name: 'Differences' })
  assert.match(await differences.innerText(), /seed\s+7\s+42/)
  await assertAccessible(other, 'comparing')
  await button(other, 'End the comparison').click()
  await drop(other, 'broken.json', '{"format": "tempo-mlx/run"')
  await other.getByRole('alert').getByText('broken.json: This file is not JSON').waitFor()

  await sets(other)
  await other.locator('.set .t').first().click()
  await button(other, 'Open this run on the server to see its next tokens').click()
  await inspector(other).getByText('What it would say next').waitFor()
  await closePage(other)
})

test('branches are cards with their log-probabilities and what differs from the best', async () => {
  const page = await openPage(browser, link({ preset: 'branches', branches: 3, max_tokens: 5 }))
  await generate(page)
  await page.getByRole('radio', { name: 'Branches (3)' }).click()
  assert.equal(await page.locator('.card').count(), 3)
  assert.ok((await page.locator('.card ins').count()) > 0)
  assert.match(await page.locator('.card').first().innerText(), /Best\s+-\d.*a token · sum -\d/)
  await button(page, 'Show in the lattice').nth(1).click()
  await button(page, 'Showing in the lattice').waitFor()
  const second = await page
    .locator('.card .text')
    .nth(1)
    .evaluate((element) => {
      element.querySelectorAll('del').forEach((gone) => gone.remove())
      return element.textContent.trim()
    })
  await button(page, 'Go on with this one').nth(1).click()
  await idle(page)
  assert.ok((await page.getByLabel('Prompt', { exact: true }).inputValue()).endsWith(second), second)
  await closePage(page)
})

test('early exit, by its preset: streams, tells how deep it went and what agreed, and offers nothing that it cannot do', async () => {
  const page = await openPage(browser, link({ max_tokens: 16 }))
  const worked = []
  page.on('request', (request) => request.url().includes('/sessions') && worked.push(request.url()))
  const post = () => page.waitForRequest((request) => request.method() === 'POST')
  const expected = { prompt: 'The capital of France is', early_exit: true, max_tokens: 16 }
  const preset = page.getByRole('radio', { name: 'Early exit' })
  await preset.click()
  await page.getByText('1 changed', { exact: true }).first().waitFor()
  await page.evaluate(() => {
    globalThis.counts = new Set()
    const look = () => globalThis.counts.add(parseInt(document.querySelector('.facts')?.textContent ?? '0', 10))
    new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true })
  })
  const [request] = await Promise.all([post(), button(page, 'Generate').click()])
  assert.deepEqual(request.postDataJSON(), expected)
  await page.getByText(/^(ended by itself|reached its length)$/).waitFor()
  await idle(page)
  const counts = await page.evaluate(() => globalThis.counts.size)
  assert.ok(counts > 5, `tokens came in ${counts} portions`)

  await button(page, 'Export ▾').click()
  const [file] = await Promise.all([
    page.waitForEvent('download'),
    page.getByRole('menuitem', { name: 'Run file' }).click(),
  ])
  await file.saveAs(`${folder}/early.json`)
  const run = JSON.parse(readFileSync(`${folder}/early.json`))
  const layers = run.steps.map((step) => step.exit_layer)
  const { mean_layers, agreement, exits } = run.early_exit
  const facts = await page.locator('.facts').innerText()
  assert.ok(
    agreement > 0 && facts.includes(`${Number((100 * agreement).toPrecision(3))}% of audited early choices agreed`),
    facts,
  )
  assert.ok(facts.includes(`${Number(mean_layers.toPrecision(3))} layers a step`), facts)

  const chart = page.getByRole('figure').filter({ hasText: 'Exit layer' })
  const drawn = await chart.locator('path.line').getAttribute('d')
  assert.equal(drawn.match(/[ML]/g).length, layers.filter((layer) => layer !== null).length)
  await page.getByRole('application').focus()
  await page.keyboard.press('Home')
  await chart.getByText('step 0: the whole model').waitFor()
  const left = layers.findIndex((layer) => layer !== null)
  for (let step = 0; step < left; step++) await page.keyboard.press('ArrowRight')
  await chart.getByText(`step ${left}: ${layers[left]}`).waitFor()
  await inspector(page).getByText(`left after layer ${layers[left]}`).waitFor()

  await inspector(page)
    .getByText('Branching, pinning and removing need every layer, so a run without early exit.')
    .waitFor()
  for (const name of [/^Branch/, /^Pin/, /^Remove/, /^Open this run/, /^Continue/, /^Undo/]) {
    assert.equal(await page.getByRole('button', { name }).count(), 0, `${name} is offered`)
  }
  for (const key of 'bpxcu') await page.keyboard.press(key)
  await idle(page)
  assert.deepEqual(worked, [])
  assert.equal(await page.getByRole('alert').count(), 0)
  await assertAccessible(page, 'early exit, inspecting')

  await page.getByRole('tab', { name: 'Members' }).click()
  await page.getByRole('region', { name: 'Members' }).evaluate((box) => {
    box.scrollTop = 100 // the event comes when the table has gone
    document.querySelector('[role=tab][id$=details]').click()
  })
  await page.setViewportSize({ width: 380, height: 760 })
  await page.emulateMedia({ colorScheme: 'dark' })
  const exit = exits.find((exit) => exit.left > 0)
  await page.getByText(`${exit.left} left, ${exit.agreed} of ${exit.audited} agreed`).first().waitFor()
  for (const tab of ['Run', 'Charts']) {
    await page.getByRole('tab', { name: tab }).click()
    await assertFits(page, `early exit, 380 px, ${tab}`)
    await assertAccessible(page, `early exit, 380 px, dark, ${tab}`)
  }
  await page.setViewportSize({ width: 1280, height: 900 })
  await button(page, 'Close').click()

  const address = page.url()
  assert.match(address, /early_exit=true/)
  await page.goto('about:blank')
  await page.goto(address)
  await page.locator('[role=radio][aria-checked=true]', { hasText: 'Early exit' }).waitFor()
  const [again] = await Promise.all([post(), button(page, 'Generate').click()])
  assert.deepEqual(again.postDataJSON(), expected)
  await page.getByText(/^(ended by itself|reached its length)$/).waitFor()
  await idle(page)

  await page.getByRole('radio', { name: 'Lineage' }).click()
  await page.waitForFunction(() => !location.hash.includes('early_exit'))
  await button(page, 'Generate').click()
  await page.getByText('can go on', { exact: true }).waitFor()
  await idle(page)
  await sets(page)
  await page.locator('.set .t').nth(1).click()
  await inspector(page).getByText('What it would say next').waitFor()
  await button(page, 'Pin').click()
  await button(page, 'Unpin').waitFor()
  await idle(page)
  await page.getByLabel('beside').selectOption({ index: 1 })
  const differences = page.getByRole('region', { name: 'Differences' })
  assert.match(await differences.innerText(), /layers a step\s+–\s+\d[^]*early_exit\s+false\s+true/)
  assert.equal(await page.getByLabel('Find tokens').count(), 0)
  await page.getByLabel('Steps to continue').fill('1')
  await button(page, 'Continue').click()
  await page.getByText('17 steps', { exact: true }).waitFor()
  await idle(page)
  await page.getByRole('button', { name: /^Undo/ }).click()
  await page.getByText('16 steps', { exact: true }).waitFor()
  await idle(page)
  await button(page, 'Export ▾').click()
  const [picture] = await Promise.all([
    page.waitForEvent('download'),
    page.getByRole('menuitem', { name: 'Lattice SVG' }).click(),
  ])
  await picture.saveAs(`${folder}/compared.svg`)
  const svg = readFileSync(`${folder}/compared.svg`, 'utf8')
  assert.ok(svg.includes('>15<') && !svg.includes('>16<'), 'the picture is not of the run as it is now')
  await closePage(page)
})

test('an invalid value is named at its field, by the page or by the server', async () => {
  const page = await openPage(browser, server.url, { expected: [/422/] })
  const field = page.getByLabel('threshold', { exact: true })
  await field.fill('1.5')
  await button(page, 'Generate').click()
  assert.equal(await field.getAttribute('aria-invalid'), 'true')
  await page.getByText('Choose a number from 0 to 1.').waitFor()
  assert.ok(await field.evaluate((element) => element === document.activeElement))
  await assertAccessible(page, 'with an error')
  await button(page, 'Set threshold back').click()

  await page.locator('summary', { hasText: 'For study' }).click()
  await page.getByLabel('min steps', { exact: true }).fill('500')
  await button(page, 'Generate').click()
  await page
    .getByRole('alert')
    .getByText(/min_steps is 500, more than max_tokens/)
    .first()
    .waitFor()
  await page.goto(link({ threshold: 'lots' }))
  await page.getByText('Choose a number from 0 to 1.').waitFor()
  await closePage(page)
})

test('waiting is shown, and a full queue can be tried again', async () => {
  const page = await openPage(browser, link({ max_tokens: 2 }), { expected: [/503/, /409/] })
  await button(page, 'Generate').waitFor()
  const free = [occupy('occupied-1')]
  await until(async () => (await health()).running === 1, 'the first request runs')
  await button(page, 'Generate').click()
  await page.getByRole('status').getByText('Waiting for other requests').waitFor()
  await button(page, 'Stop').first().click()
  await idle(page)
  free.push(occupy('occupied-2'))
  await until(async () => (await health()).waiting === 1, 'the second request waits')
  await button(page, 'Generate').click()
  await page
    .getByRole('alert')
    .getByText(/Too many requests/)
    .waitFor()
  for (const end of free) await end()
  await page.getByRole('button', { name: /^Try again$/ }).click()
  await page.getByText('2 steps', { exact: true }).waitFor()
  await closePage(page)
})

test('dark, small and large: everything fits and can be read', async () => {
  for (const [width, height] of [
    [380, 760],
    [2560, 1300],
  ]) {
    for (const colorScheme of ['light', 'dark']) {
      const page = await openPage(browser, link({ max_tokens: 3, threshold: 0.05 }), {
        colorScheme,
        viewport: { width, height },
      })
      await button(page, 'Generate').waitFor()
      await assertFits(page, `${width} px, first visit`)
      await generate(page)
      for (const tab of ['Members', 'Run', 'Charts']) {
        if (width < 2000) await page.getByRole('tab', { name: tab }).click()
        else await page.getByRole('region', { name: tab, exact: true }).waitFor() // all at once
        await assertFits(page, `${width} px, ${tab}`)
        await assertAccessible(page, `${width} px, ${colorScheme}, ${tab}`)
      }
      await sets(page)
      await page.locator('.set .t').first().click()
      await inspector(page).waitFor()
      await assertFits(page, `${width} px, inspecting`)
      const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor)
      const was = await ground()
      const phone = width === 380
      if (phone) await page.getByRole('button', { name: 'More ▾' }).click()
      await page.getByRole(phone ? 'menuitem' : 'button', { name: /^(Light|Dark) colours$/ }).click()
      assert.notEqual(await ground(), was)
      await closePage(page)
    }
  }
})

test('a server that goes away is reported, what came stays, and it can be tried again', async () => {
  const page = await openPage(browser, link({ max_tokens: 200 }), { expected: [/ERR_/, /Failed to load/] })
  await button(page, 'Generate').click()
  await grown(page, 'steps', 2)
  server.kill()
  await page
    .getByRole('alert')
    .getByText(/does not answer|broke off/)
    .waitFor()
  assert.match(await text(page).innerText(), /Paris/)
  await page.getByText('not answering').waitFor()
  await button(page, 'Try again').waitFor()
  await assertAccessible(page, 'with a problem')
  await closePage(page)
  server = null
})

/** Nothing is lost: runs are kept in the browser, and a reload finds what it left. The real server and model. */

import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { assertAccessible, assertFits, closePage, grown, launch, openPage } from './browser.mjs'
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

const link = (settings) => `${server.url}/#${new URLSearchParams({ prompt: 'Once upon a time', ...settings })}`
const text = (page) => page.getByRole('group', { name: /^Text, / })
const button = (page, name) => page.getByRole('button', { name, exact: true })
const idle = (page) => page.locator('button.primary:enabled', { hasText: 'Generate' }).waitFor()

test('a reload in the middle finds the running session, and it can go on', async () => {
  const page = await openPage(browser, link({ max_tokens: 200 }))
  await button(page, 'Generate').click()
  await grown(page, 'steps', 5)
  const before = (await text(page).innerText()).slice(0, 24)
  await page.reload()
  await page.getByText(/^\d+ steps$/).waitFor()
  assert.ok((await text(page).innerText()).startsWith(before))
  const steps = parseInt(await page.getByText(/^\d+ steps$/).innerText(), 10)
  assert.ok(steps < 200)
  await button(page, 'Continue').click()
  await page.getByText(`${steps + 20} steps`, { exact: true }).waitFor()
  await idle(page)
  await closePage(page)
})

test('a server that is back takes its banner away', async () => {
  const page = await openPage(browser, link({ max_tokens: 2 }), { expected: [/ERR_FAILED/] })
  await button(page, 'Generate').waitFor()
  await page.route(/health|sessions/, (route) => route.abort())
  await button(page, 'Generate').click()
  await page.getByRole('alert').getByText('does not answer').waitFor()
  await page.unroute(/health|sessions/)
  await page.getByText('ready', { exact: true }).waitFor()
  assert.equal(await page.getByRole('alert').count(), 0)
  await closePage(page)
})

test('runs are listed, named, searched, opened again and deleted', async () => {
  const page = await openPage(browser, link({ max_tokens: 3 }))
  await button(page, 'Generate').click()
  await page.getByText('3 steps', { exact: true }).waitFor()
  await idle(page)
  const words = await text(page).innerText()
  await page.getByLabel('Prompt', { exact: true }).fill('The sea')
  await button(page, 'Generate').click()
  await text(page).getByText('The sea').waitFor()
  await idle(page)
  await page.evaluate(() => sessionStorage.clear()) // a tab of another day
  await page.goto('about:blank')
  await page.goto(`${server.url}/`)
  await page.locator('.fork').first().waitFor()

  await button(page, 'Your runs').click()
  const list = page.getByRole('dialog', { name: 'Your runs' })
  const names = list.getByLabel('Name of this run')
  assert.deepEqual(await names.evaluateAll((all) => all.map((one) => one.value)), ['The sea', 'Once upon a time'])
  await assertAccessible(page, 'the list of runs')
  await page.setViewportSize({ width: 380, height: 760 })
  await assertFits(page, 'the list of runs at 380 px')
  await page.setViewportSize({ width: 1280, height: 900 })
  await names.nth(1).fill('A beginning')
  await names.nth(1).press('Tab')
  await list.getByLabel('Search your runs').fill('beginning')
  await list.getByRole('button', { name: 'Delete A beginning' }).waitFor()
  assert.equal(await names.count(), 1)
  await list.getByRole('button', { name: 'Open' }).click()
  await page.getByText('3 steps', { exact: true }).waitFor()
  assert.equal(await text(page).innerText(), words)
  await page.reload()
  await page.getByText('3 steps', { exact: true }).waitFor()

  await button(page, 'Your runs').click()
  await list.getByRole('button', { name: 'Delete A beginning' }).click()
  await list.getByRole('button', { name: 'Delete The sea' }).click()
  await list.getByText('Nothing yet.').waitFor()
  await closePage(page)
})

/** States that a page must find its way out of, and back into. The real server, with the real model. */

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { after, before, test } from 'node:test'
import { closePage, drop, launch, openPage } from './browser.mjs'
import { capital } from './runs.mjs'
import { startServer } from './server.mjs'

let browser
let server

before(async () => {
  browser = await launch()
  server = await startServer('--max-tokens-limit', '500')
})
after(async () => {
  await browser?.close()
  await server?.stop()
})

const link = (settings) => `${server.url}/#${new URLSearchParams({ prompt: 'The capital of France is', ...settings })}`
const button = (page, name) => page.getByRole('button', { name, exact: true })
const idle = (page) => page.locator('button.primary:enabled', { hasText: 'Generate' }).waitFor()
const place = (page, name) => page.getByRole('radio', { name, exact: true }).click()
const prompt = (page) => page.getByLabel('Prompt', { exact: true })
const message = (page) => page.getByLabel('Message', { exact: true })

async function generate(page) {
  await button(page, 'Generate').click()
  await page.getByText(/^[1-9]\d* steps?$/).waitFor()
  await idle(page)
}

test('what was refused is not held against what is asked for next', async () => {
  const page = await openPage(browser, link({ max_tokens: 2 }), { expected: [/422/] })
  await prompt(page).fill('')
  await button(page, 'Generate').click()
  await page.getByText('Write a prompt first.').waitFor()
  assert.ok(await prompt(page).evaluate((element) => element === document.activeElement))
  await place(page, 'Conversation')
  await message(page).fill('Hello')
  assert.equal(await page.getByText('Write a prompt first.').count(), 0, 'it is no matter of the conversation')
  await place(page, 'Text')
  await button(page, 'Photosynthesis is the process by which').click()
  await generate(page)
  await page.getByLabel('Steps to continue').fill('501')
  await button(page, 'Continue').click()
  await page.getByRole('alert').getByText(/up to 500/).waitFor() // prettier-ignore
  await generate(page)
  await closePage(page)
})

test('on a phone, what is wrong comes into sight', async () => {
  const page = await openPage(browser, link({ threshold: 'lots' }), { viewport: { width: 390, height: 800 } })
  await button(page, 'Generate').click()
  const field = page.getByLabel('threshold', { exact: true })
  await field.waitFor()
  assert.ok(await field.evaluate((element) => element === document.activeElement))
  await closePage(page)
})

test('back and forward lead to where one was', async () => {
  const page = await openPage(browser, server.url)
  await button(page, 'Generate').waitFor()
  await place(page, 'Conversation')
  await message(page).waitFor()
  await page.waitForFunction(() => location.hash === '#conversation') // the place is in the history by then
  await page.goBack()
  await button(page, 'Generate').waitFor()
  await page.goForward()
  await message(page).waitFor()
  await page.evaluate(() => (location.hash = '#conversation=no-longer-there'))
  await page.waitForFunction(() => location.hash === '#conversation')
  await page.goBack()
  await page.goBack()
  await button(page, 'Generate').waitFor()
  await closePage(page)
})

test('a run that is opened from a conversation is shown, and the settings of the conversation stay', async () => {
  const page = await openPage(browser, `${server.url}/#conversation`)
  const length = page.getByLabel('max tokens', { exact: true })
  await length.fill('7')
  await drop(page, 'run.json', JSON.stringify({ ...capital(), config: { max_tokens: 3, threshold: 0.4 } }))
  await page.getByText('3 steps', { exact: true }).waitFor()
  assert.equal(await length.inputValue(), '3')
  await place(page, 'Conversation')
  await message(page).waitFor()
  assert.equal(await length.inputValue(), '7')
  await button(page, 'Your runs').click()
  await page.getByRole('dialog').getByRole('button', { name: 'Open', exact: true }).first().click()
  await page.getByText('3 steps', { exact: true }).waitFor()
  await closePage(page)
})

test('a dialog has the keys while it is open', async () => {
  const page = await openPage(browser, link({ max_tokens: 400, min_steps: 400 }))
  await button(page, 'Generate').click()
  await page.getByText(/^[1-9]\d* steps?$/).waitFor()
  await page.keyboard.press('t')
  await page.keyboard.press('?')
  await page.getByRole('dialog').waitFor()
  await page.keyboard.press('Escape')
  await page.getByRole('dialog').waitFor({ state: 'hidden' })
  await page.waitForTimeout(300)
  assert.equal(await button(page, 'Stop').count(), 2, 'it still generates')
  await page.keyboard.press('Escape')
  await idle(page)
  await closePage(page)
})

test('a name that is not wanted after all is not kept', async () => {
  const page = await openPage(browser, `${server.url}/#conversation`)
  await page.getByLabel('max tokens', { exact: true }).fill('2')
  await message(page).fill('Who?')
  await page.keyboard.press('Enter')
  await button(page, 'Copy the answer').waitFor()
  await button(page, 'Rename Who?').click()
  await page.keyboard.type('Nobody')
  await page.keyboard.press('Escape')
  await button(page, 'Rename Who?').waitFor()
  assert.ok(await button(page, 'Rename Who?').evaluate((element) => element === document.activeElement))
  await page.keyboard.press('Enter')
  await page.keyboard.type('Somebody')
  await page.keyboard.press('Enter')
  await button(page, 'Rename Somebody').waitFor()
  await closePage(page)
})

test('where a browser keeps nothing, all goes on for as long as the page is open', async () => {
  const page = await openPage(browser, null)
  await page.addInitScript(() => {
    const forbid = () => {
      throw new DOMException('The user does not allow it.', 'SecurityError')
    }
    for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(globalThis, name, { get: forbid })
    IDBFactory.prototype.open = forbid
  })
  await page.goto(link({ max_tokens: 2 }))
  await generate(page)
  await button(page, 'Your runs').click()
  await page.getByRole('dialog').getByText('Nothing yet.').waitFor()
  await button(page, 'Close your runs').click()
  await place(page, 'Conversation')
  await page.getByLabel('max tokens', { exact: true }).fill('2')
  await message(page).fill('Who?')
  await page.keyboard.press('Enter')
  await button(page, 'Copy the answer').waitFor()
  await place(page, 'Text')
  await button(page, 'Generate').waitFor()
  await place(page, 'Conversation')
  await button(page, 'Copy the answer').waitFor()
  await button(page, 'Delete this question').waitFor()
  page.on('dialog', (dialog) => dialog.accept())
  await button(page, 'Delete this question').click()
  await page.getByText('Ask, and see').waitFor()
  await closePage(page)
})

test('what another page of this address has left in the tab does no harm', async () => {
  const page = await openPage(browser, null)
  await page.addInitScript(() => sessionStorage.setItem('tempo-mlx.shown', 'null, or no JSON'))
  await page.goto(server.url)
  await page.locator('.fork').first().waitFor()
  await closePage(page)
})

test('a page from another machine, without encryption, can copy as well', async () => {
  const page = await openPage(browser, null)
  await page.addInitScript(() => {
    Object.defineProperty(Navigator.prototype, 'clipboard', { value: undefined })
    document.addEventListener('copy', () => (globalThis.taken = document.activeElement.value))
  })
  await page.goto(link({ max_tokens: 2 }))
  await generate(page)
  await button(page, 'Copy the text').click()
  await page.getByText('Copied.').waitFor({ state: 'attached' })
  assert.match(await page.evaluate(() => globalThis.taken), /Paris/)
  assert.ok(await button(page, 'Copy the text').evaluate((element) => element === document.activeElement))
  await button(page, 'Export ▾').click()
  await page.getByRole('menuitem', { name: 'Copy a link' }).click()
  await page.getByText('Link copied.').waitFor()
  assert.match(await page.evaluate(() => globalThis.taken), /#prompt=The/)
  await closePage(page)
})

test('answers are taken away as they are shown, and can be read again', async (t) => {
  const page = await openPage(browser, `${server.url}/#${new URLSearchParams({ prompt: 'Is the sky blue?', decoder: 'enumerate' })}`) // prettier-ignore
  await page.getByLabel('choices', { exact: true }).fill('Yes\nNo')
  await button(page, 'Ask').click()
  await page.getByText('not looked at', { exact: true }).waitFor()
  await page.locator('button.primary:enabled', { hasText: 'Ask' }).waitFor()
  assert.equal(await button(page, 'Continue').count(), 0, 'there is no text to go on with')
  await button(page, 'Copy the text').click()
  await page.getByText('Copied.').waitFor({ state: 'attached' })
  assert.match(await page.evaluate(() => navigator.clipboard.readText()), /^(Yes|No)\t.*%\n(Yes|No)\t.*%$/)
  for (const [item, kind] of [
    ['Run file', 'json'],
    ['This viewer', 'html'],
  ]) {
    await button(page, 'Export ▾').click()
    const [file] = await Promise.all([
      page.waitForEvent('download'),
      page.getByRole('menuitem', { name: item }).click(),
    ])
    const path = await file.path()
    if (kind === 'json') {
      const other = await openPage(browser, server.url)
      await drop(other, 'answers.json', readFileSync(path, 'utf8'))
      await other.getByText('not looked at', { exact: true }).waitFor()
      await closePage(other)
    } else {
      const other = await openPage(browser, null, { offline: true })
      await other.setContent(readFileSync(path, 'utf8'))
      await other.getByText('not looked at', { exact: true }).waitFor()
      await closePage(other)
    }
  }
  await closePage(page)
})

test('an answer of the server that breaks off is said to have', async () => {
  const page = await openPage(browser, link({ max_tokens: 2 }))
  await button(page, 'Generate').waitFor()
  await page.route(/sessions$/, (route) => route.fulfill({ status: 201, body: '{"id": "session-1", "ru' }))
  await button(page, 'Generate').click()
  await page.getByRole('alert').getByText('does not answer').waitFor()
  await page.unroute(/sessions$/)
  await page.getByRole('button', { name: 'Try again' }).click()
  await page.getByText('2 steps', { exact: true }).waitFor()
  await closePage(page)
})

test('a conversation in two tabs: the second does not answer what the first is about to', async () => {
  const page = await openPage(browser, `${server.url}/#conversation`)
  await page.getByLabel('max tokens', { exact: true }).fill('3')
  let go
  await page.route(/sessions$/, (route) => (go = () => route.continue()))
  await message(page).fill('Who?')
  await page.keyboard.press('Enter')
  await page.getByText('Reading the prompt').waitFor()
  const second = await page.context().newPage()
  const asked = []
  second.on('request', (request) => request.method() === 'POST' && asked.push(request.url()))
  await second.goto(page.url())
  await second.getByRole('article', { name: 'Answer' }).waitFor()
  await second.waitForTimeout(6000) // time for it to look after what is unfinished
  assert.deepEqual(asked, [])
  go()
  await button(page, 'Copy the answer').waitFor()
  await page.getByRole('status').getByText('Done.').waitFor({ state: 'attached' })
  await closePage(page)
})

test('a message that is not sent yet waits', async () => {
  const page = await openPage(browser, `${server.url}/#conversation`)
  await message(page).fill('Who')
  await place(page, 'Text')
  await button(page, 'Generate').waitFor()
  await place(page, 'Conversation')
  assert.equal(await message(page).inputValue(), 'Who')
  await closePage(page)
})

test('what cannot be stopped can be left', async () => {
  const page = await openPage(browser, link({ max_tokens: 400, min_steps: 400 }))
  await button(page, 'Generate').click()
  await page.getByText(/^[1-9]\d* steps?$/).waitFor()
  await page.getByLabel('Find a setting').fill('min p')
  const unset = page.locator('.field', { hasText: 'min p' }).locator('input[type=range]')
  assert.equal(await unset.inputValue(), '0', 'what is off is at the beginning of its slider')
  await page.route(/requests/, () => undefined) // it never answers
  await button(page, 'Stop').first().click()
  await page.waitForTimeout(1500)
  await button(page, 'Stop').first().click()
  await idle(page)
  await page.getByLabel('Steps to continue').fill('')
  assert.ok(await button(page, 'Continue').isDisabled())
  await closePage(page)
})

test('a menu that is left by Tab is closed', async () => {
  const page = await openPage(browser, server.url)
  const menu = page.getByRole('button', { name: 'View ▾' })
  await menu.press('Enter')
  await page.locator('[role^=menuitem]:focus').waitFor()
  await page.keyboard.press('Tab')
  assert.equal(await page.getByRole('menu').count(), 0)
  assert.ok(await button(page, 'Copy the text').evaluate((element) => element === document.activeElement))
  await closePage(page)
})

test('the form shows what the server was started with, and can choose otherwise', async () => {
  process.env.TEMPO_THRESHOLD = '0.3'
  const other = await startServer('--max-tokens-limit', '30').finally(() => delete process.env.TEMPO_THRESHOLD)
  try {
    const page = await openPage(browser, other.url)
    const field = page.getByLabel('threshold', { exact: true })
    await field.waitFor()
    assert.equal(await field.inputValue(), '0.3')
    assert.equal(await page.getByLabel('max tokens', { exact: true }).inputValue(), '30')
    await button(page, 'Generate').click()
    await page.getByText('30 steps', { exact: true }).waitFor()
    await idle(page)
    await field.fill('0.1')
    const [request] = await Promise.all([
      page.waitForRequest((r) => r.method() === 'POST'),
      button(page, 'Generate').click(),
    ])
    assert.equal(request.postDataJSON().threshold, 0.1)
    await idle(page)
    await place(page, 'Conversation')
    await message(page).fill('Who?')
    await page.keyboard.press('Enter')
    await button(page, 'Copy the answer').waitFor()
    await closePage(page)
  } finally {
    await other.stop()
  }
})

test('a key with characters that no key has is wrong, and can be written again', async () => {
  const other = await startServer('--api-keys', 'secret')
  try {
    const page = await openPage(browser, other.url, { expected: [/401/] })
    const key = page.getByLabel('API key')
    await key.fill('sécret – ключ')
    await button(page, 'Use it').click()
    await page.getByRole('alert').getByText('A valid API key is needed').waitFor()
    await key.fill('secret')
    await button(page, 'Use it').click()
    await page.locator('.fork').first().waitFor()
    await closePage(page)
  } finally {
    await other.stop()
  }
})

/** What a model answers, and how probable each answer is; branches beside each other. The real server and model. */

import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { assertAccessible, assertFits, closePage, launch, openPage } from './browser.mjs'
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

const link = (settings) => `${server.url}/#${new URLSearchParams(settings)}`
const button = (page, name) => page.getByRole('button', { name, exact: true })
const text = (page) => page.getByRole('region', { name: 'Text', exact: true })

test('a question is asked: bars open to their texts, and are there after a reload', async () => {
  const page = await openPage(browser, link({ prompt: 'What is the capital of Australia?' }))
  await page.getByRole('radio', { name: 'Answers', exact: true }).click()
  assert.equal(await page.getByLabel('threshold', { exact: true }).inputValue(), '0.001')
  await page.getByLabel('leaves', { exact: true }).fill('4')
  await page.getByLabel('max tokens', { exact: true }).fill('12')
  const [request] = await Promise.all([page.waitForRequest((r) => r.method() === 'POST'), button(page, 'Ask').click()])
  assert.match(request.url(), /ask\/stream$/)
  const { prompt, by, leaves, threshold, chat } = request.postDataJSON()
  assert.deepEqual([prompt, by, leaves, threshold, chat], ['What is the capital of Australia?', 'text', 4, 0.001, true])
  await page.locator('button.primary:enabled', { hasText: 'Ask' }).waitFor()

  const bars = text(page).locator('summary')
  assert.ok((await bars.count()) >= 2)
  assert.match(await bars.first().innerText(), /Canberra[^]*%/)
  const rest = text(page).locator('.rest')
  assert.match(await rest.innerText(), /not looked at\s+\d+%/)
  await bars.first().focus()
  await page.keyboard.press('Enter')
  await text(page).locator('details[open] ul p').first().waitFor()
  await assertAccessible(page, 'answers')
  await page.setViewportSize({ width: 380, height: 760 })
  await assertFits(page, 'answers at 380 px')
  await page.setViewportSize({ width: 1280, height: 900 })

  await page.setViewportSize({ width: 2560, height: 1200 })
  const [name, bar] = await Promise.all(['.name', '.mass'].map((part) => bars.first().locator(part).boundingBox()))
  assert.ok(bar.x < name.x + 500, 'a bar stands beside its name')
  await page.setViewportSize({ width: 1280, height: 900 })

  assert.equal(await page.getByRole('radio', { name: 'Sets' }).count(), 0)
  await page.getByRole('radio', { name: /^Texts \(\d\)$/ }).click()
  const cards = text(page).locator('.card')
  const lengths = async () => (await cards.allInnerTexts()).map((card) => Number(/(\d+) tokens/.exec(card)[1]))
  const all = await lengths()
  await page.getByLabel('sorted by').selectOption('length')
  assert.deepEqual(
    await lengths(),
    [...all].sort((a, b) => b - a),
  )
  await page.getByLabel('sorted by').selectOption('sum')
  const sums = (await cards.allInnerTexts()).map((card) => Number(/sum (-[\d.]+)/.exec(card)[1]))
  assert.deepEqual(
    sums,
    [...sums].sort((a, b) => b - a),
  )
  await assertAccessible(page, 'texts, sorted')

  await page.reload()
  await text(page).locator('summary').first().getByText('Canberra').waitFor()
  await closePage(page)
})

test('of an open-ended question the text is shown, and no bars', async () => {
  const settings = { decoder: 'enumerate', chat: true, threshold: 0.05, leaves: 2, max_tokens: 24 }
  const page = await openPage(browser, link({ prompt: 'Tell me a short story about a fox.', ...settings }))
  await button(page, 'Ask').click()
  await page.locator('button.primary:enabled', { hasText: 'Ask' }).waitFor()
  await text(page).getByText('One of very many texts').waitFor()
  assert.ok((await text(page).locator('.said').innerText()).length > 40)
  assert.equal(await text(page).locator('.mass').count(), 0)
  await text(page).getByText('1 more of them').click()
  await text(page).locator('details li p').waitFor()
  await assertAccessible(page, 'an open-ended question')
  await closePage(page)
})

test('given answers are weighed, and what makes texts one answer can be said', async () => {
  const url = link({ prompt: 'Is 91 a prime number?', decoder: 'enumerate', choices: 'yes\nno' })
  const page = await openPage(browser, url, { expected: [/422/] })
  await button(page, 'Ask').click()
  await text(page).getByText('not looked at', { exact: true }).waitFor()
  assert.deepEqual((await text(page).locator('summary .name').allInnerTexts()).sort(), ['no', 'yes'])
  await assertAccessible(page, 'given answers')
  await page.locator('button.primary:enabled', { hasText: 'Ask' }).waitFor()
  await page.getByLabel('choices', { exact: true }).fill('')
  await page.getByLabel('Texts are one answer with').selectOption('regex')
  await page.getByLabel('Regular expression').fill('[')
  await page.getByLabel('max tokens', { exact: true }).fill('6')
  await button(page, 'Ask').click()
  await page.getByRole('alert').getByText('regular expression').waitFor()
  await closePage(page)
})

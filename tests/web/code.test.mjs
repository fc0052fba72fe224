/**
 * A model that writes code: its answer is rendered with its fences, and one can talk with it. TEMPO_WEB_CODE_MODEL names
 * the weights, for instance of Qwen2.5-Coder 0.5B Instruct; without them there is nothing to test.
 */

import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { after, before, test } from 'node:test'
import { assertAccessible, assertFits, closePage, launch, openPage } from './browser.mjs'
import { startServer } from './server.mjs'

const MODEL = process.env.TEMPO_WEB_CODE_MODEL
const skip = !MODEL
  ? 'TEMPO_WEB_CODE_MODEL is not set'
  : !existsSync(MODEL)
    ? `TEMPO_WEB_CODE_MODEL is ${MODEL}, which is not there`
    : false

let browser
let server

before(async () => {
  if (skip) return
  browser = await launch()
  server = await startServer('--model', MODEL)
})
after(async () => {
  await browser?.close()
  await server?.stop()
})

test('an answer with code shows it as code, with forks inside and nothing of the fences', { skip }, async () => {
  const prompt = 'Write a Python function that adds two numbers.'
  const settings = new URLSearchParams({ prompt, chat: 'true', max_tokens: '60', threshold: '0.05' })
  const page = await openPage(browser, `${server.url}/#${settings}`)
  await page.getByRole('button', { name: 'Generate', exact: true }).click()
  await page.locator('.markdown .fork').first().waitFor()
  await page.locator('button.primary:enabled', { hasText: 'Generate' }).waitFor()
  const code = page.locator('.markdown pre code')
  assert.match(await code.first().innerText(), /def \w+\(.*\):\n\s+/)
  assert.doesNotMatch(await page.locator('.markdown').innerText(), /```/)
  const font = (element) => getComputedStyle(element).fontFamily
  assert.match(await code.first().evaluate(font), /mono/i)
  const inside = code.locator('.fork')
  if ((await inside.count()) > 0) {
    await inside.first().click()
    await page.getByRole('dialog', { name: 'What it says here' }).waitFor()
    await page.keyboard.press('Escape')
  }
  await assertAccessible(page, 'code')
  await page.setViewportSize({ width: 380, height: 760 })
  await assertFits(page, 'code at 380 px')
  await closePage(page)
})

test(
  'the first question is edited two turns later, answered twice, and gone on from; the map holds all of it',
  { skip },
  async () => {
    const page = await openPage(browser, `${server.url}/#conversation`)
    await page.getByText('Ask, and see').waitFor()
    await page.getByLabel('max tokens', { exact: true }).fill('16')
    const question = page.getByLabel('Message', { exact: true })
    const answers = page.getByRole('article', { name: 'Answer' })
    const idle = () => page.locator('.talk form .primary', { hasText: 'Send' }).waitFor()
    async function ask(text) {
      const before = await answers.count()
      await question.fill(text)
      const [request] = await Promise.all([page.waitForRequest(/\/sessions$/), page.keyboard.press('Enter')])
      await answers.nth(before).waitFor()
      await idle()
      return request.postDataJSON().messages
    }
    await ask('Suggest a name for a function that adds two numbers.')
    await ask('And one that multiplies them?')
    const first = await answers.first().locator('.said').innerText()

    await page.getByRole('button', { name: 'Edit this question' }).first().click()
    await page.getByLabel('Your question, edited').fill('Suggest a name for a function that sorts words.')
    await page.keyboard.press('Enter')
    await page.getByRole('group', { name: 'Questions in this place' }).getByText('2/2').waitFor()
    await idle()
    await page.getByRole('button', { name: 'Another answer' }).click()
    await page.getByRole('group', { name: 'Answers in this place' }).getByText('2/2').waitFor()
    await idle()
    const second = await answers.last().locator('.said').innerText()
    const told = await ask('And one that counts them?')
    assert.deepEqual(told.map(({ role }) => role), ['user', 'assistant', 'user']) // prettier-ignore
    assert.match(told[0].content, /sorts words/)
    assert.equal(told[1].content, second, 'it is told the answer that is shown')

    const tree = page.getByRole('tree', { name: 'All that was said' })
    assert.equal(await tree.getByRole('treeitem').count(), 9)
    await assertAccessible(page, 'a conversation with branches in two places')
    await tree.getByRole('treeitem', { name: 'And one that multiplies them?' }).click()
    await page.getByText('adds two numbers').last().waitFor()
    assert.equal(await answers.first().locator('.said').innerText(), first)
    await page.reload()
    await page.getByText('And one that multiplies them?').last().waitFor()
    assert.equal(await tree.getByRole('treeitem').count(), 9)
    await page.setViewportSize({ width: 2560, height: 1300 })
    await assertFits(page, 'a conversation at 2560 px')
    await closePage(page)
  },
)

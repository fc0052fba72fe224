/**
 * A model that writes code: its answer is rendered with its fences. TEMPO_WEB_CODE_MODEL names the weights, for instance
 * of Qwen2.5-Coder 0.5B Instruct; without them there is nothing to test.
 */

import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { test } from 'node:test'
import { assertAccessible, assertFits, closePage, launch, openPage } from './browser.mjs'
import { startServer } from './server.mjs'

const MODEL = process.env.TEMPO_WEB_CODE_MODEL
const skip = !MODEL
  ? 'TEMPO_WEB_CODE_MODEL is not set'
  : !existsSync(MODEL)
    ? `TEMPO_WEB_CODE_MODEL is ${MODEL}, which is not there`
    : false

test('an answer with code shows it as code, with forks inside and nothing of the fences', { skip }, async (t) => {
  const server = await startServer('--model', MODEL)
  t.after(server.stop)
  const browser = await launch()
  t.after(() => browser.close())
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

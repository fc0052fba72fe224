/** A model that thinks before it answers: its reasoning is folded, also while it comes. The real server and model. */

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { after, before, test } from 'node:test'
import { assertAccessible, assertFits, closePage, launch, openPage } from './browser.mjs'
import { PYTHON, startServer } from './server.mjs'

const folder = mkdtempSync(`${tmpdir()}/tempo-`)
const TEMPLATE = `{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}`
let browser
let server

before(async () => {
  browser = await launch()
  const where = 'from tempo_mlx.weights.registry import models_directory as d; print(d() / "smollm2-135m.gguf")'
  const model = execFileSync(PYTHON, ['-c', where], { encoding: 'utf8' }).trim()
  const told = ['-m', 'gguf.scripts.gguf_new_metadata', '--chat-template', TEMPLATE, model, `${folder}/thinks.gguf`]
  execFileSync(PYTHON, told, { stdio: 'pipe' })
  server = await startServer('--model', `${folder}/thinks.gguf`)
})
after(async () => {
  await browser?.close()
  await server?.stop()
  rmSync(folder, { recursive: true })
})

const thought = (page) => page.locator('details.reasoning')

test('in a conversation an answer does not hold what was thought before it, nor is the model told it again', async () => {
  const page = await openPage(browser, `${server.url}/#conversation`)
  await page.getByRole('checkbox', { name: 'enable thinking', exact: true }).check()
  await page.getByLabel('thinking budget', { exact: true }).fill('30')
  await page.getByLabel('max tokens', { exact: true }).fill('60')
  await page.getByRole('button', { name: 'Why is the sky blue?' }).click()
  await page.getByText('Thinking …').waitFor()
  const said = page.locator('.answer .said')
  assert.equal(await said.innerText(), '')
  await page.getByText('Thinking …').focus()
  await page.keyboard.press('Enter')
  await thought(page).locator('p').waitFor()
  await assertAccessible(page, 'an answer that is being thought about')
  await page.getByText('Reasoning', { exact: true }).waitFor()
  assert.ok(await thought(page).locator('p').isVisible(), 'it is as open as it was')
  await page.locator('.talk form .primary', { hasText: 'Send' }).waitFor()
  const reasoning = await thought(page).locator('p').innerText()
  const answer = await said.innerText()
  assert.ok(reasoning.length > 40 && answer.length > 20, `${reasoning} | ${answer}`)
  assert.doesNotMatch(reasoning + answer, /think>/)
  assert.ok(!answer.includes(reasoning))

  await page.reload()
  await thought(page).waitFor()
  assert.ok(!(await thought(page).locator('p').isVisible()))
  await page.getByLabel('Message', { exact: true }).fill('And at night?')
  const [request] = await Promise.all([page.waitForRequest(/\/sessions$/), page.keyboard.press('Enter')])
  assert.equal(request.postDataJSON().messages[1].content, answer.replaceAll('\n\n', '\n').trim())
  await page.getByText('Thinking …').waitFor()
  await page.getByRole('button', { name: 'Stop' }).click()
  await page.getByText('stopped', { exact: true }).waitFor()
  assert.equal(await said.last().innerText(), '', 'what was thought stays no answer')
  await page.setViewportSize({ width: 380, height: 760 })
  await assertFits(page, 'reasoning at 380 px')
  await closePage(page)
})

for (const more of [{ threshold: 0.07 }, { preset: 'branches', branches: 3 }]) {
  test(`in a text it is told apart as it grows, with ${JSON.stringify(more)}`, async () => {
    const settings = { chat: true, enable_thinking: true, thinking_budget: 40, max_tokens: 200, ...more }
    const query = new URLSearchParams({ prompt: 'Why is the sky blue?', ...settings })
    const page = await openPage(browser, `${server.url}/#${query}`)
    await page.getByRole('button', { name: 'Generate', exact: true }).click()
    await page.getByText('Thinking …').waitFor()
    await assertAccessible(page, 'a text that is being thought about')
    await page.getByText('Reasoning', { exact: true }).waitFor()
    const grown = page.locator('.measure > .markdown')
    const shown = await grown.innerText()
    assert.ok((await page.locator('.cursor').count()) === 1 && !/think>/.test(shown), `${shown} while it grows`)
    await page.locator('button.primary:enabled', { hasText: 'Generate' }).waitFor()
    const reasoning = await thought(page).locator('p').textContent()
    const text = await page.getByRole('region', { name: 'Text', exact: true }).innerText()
    assert.ok(reasoning && !text.includes(reasoning))
    await closePage(page)
  })
}

/** Takes the README's pictures of the web page: `make screenshots`. The real server, the real model. */

import { mkdirSync, readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { launch, openPage, closePage, ROOT, WEB } from '../tests/web/browser.mjs'
import { startServer } from '../tests/web/server.mjs'

const FOLDER = process.argv[2] ?? `${ROOT}docs/images`
const STORY = {
  prompt: 'Once upon a time in a distant galaxy',
  max_tokens: 40,
  threshold: 0.07,
  pruning_signal: 'posterior',
  seed: 42,
}

/** A page of somebody else's. */
const BLOG = `<!doctype html><html lang="en"><meta charset="utf-8"><title>A story</title>
<style>body { max-width: 760px; margin: 24px auto; font: 18px/1.6 Georgia, serif } tempo-run { margin: 20px 0 }</style>
<script src="tempo-run.js" defer></script><h1>What it nearly said</h1>
<p>A language model holds several texts at once. Press a marked word to see what else stood there.</p>
<tempo-run src="story.json"></tempo-run>`

const server = await startServer('--model-alias', 'smollm2-135m')
const browser = await launch()
mkdirSync(FOLDER, { recursive: true })

const open = (settings, options) =>
  openPage(browser, `${server.url}/#${new URLSearchParams(settings)}`, { deviceScaleFactor: 1.25, ...options })

async function generate(page) {
  await page.getByRole('button', { name: 'Generate', exact: true }).click()
  await page.getByRole('button', { name: /^Undo: |^Export/ }).first().waitFor()
  await page.locator('button.primary:enabled', { hasText: 'Generate' }).waitFor()
}

async function shoot(page, name) {
  await page.mouse.move(0, 0)
  await page.waitForTimeout(400)
  await page.screenshot({ path: `${FOLDER}/${name}.png` })
  await closePage(page)
}

const run = await open(STORY, { viewport: { width: 1440, height: 900 } })
await generate(run)
await run.getByRole('application').focus()
await run.keyboard.press('Home')
await run.keyboard.press('Escape')
await run.evaluate(() => document.activeElement.blur())
await shoot(run, 'web-run')

const member = await open(STORY, { viewport: { width: 1440, height: 900 }, colorScheme: 'dark' })
await generate(member)
await member.getByRole('radio', { name: 'Sets' }).click()
await member.locator('.set .t').nth(5).click()
await member.getByText('What it would say next').waitFor()
await shoot(member, 'web-member')

const fork = await openPage(browser, server.url, { deviceScaleFactor: 1.25, viewport: { width: 1440, height: 900 } })
await fork.locator('.fork').nth(4).click()
await fork.waitForTimeout(400)
await fork.screenshot({ path: `${FOLDER}/web-fork.png` })
await closePage(fork)

const talk = await openPage(browser, `${server.url}/#conversation`, {
  deviceScaleFactor: 1.25,
  viewport: { width: 1440, height: 900 },
})
const answered = () => talk.locator('.talk form .primary', { hasText: 'Send' }).waitFor()
await talk.getByLabel('max tokens', { exact: true }).fill('60')
await talk.getByRole('button', { name: 'Tell me a short story about a fox.' }).click()
await talk.locator('.fork').nth(3).waitFor()
await answered()
await talk.locator('.fork').nth(1).click()
await talk.locator('.fork-card .main').nth(1).click()
await talk.getByText('2/2', { exact: true }).waitFor()
await answered()
await talk.getByLabel('Message', { exact: true }).fill('What was its name?')
await talk.keyboard.press('Enter')
await talk.getByRole('article', { name: 'Answer' }).nth(1).waitFor()
await answered()
await talk.getByRole('button', { name: 'Lattice', exact: true }).last().click()
await shoot(talk, 'web-conversation')

const branches = await open(
  { ...STORY, pruning_signal: '', preset: 'branches', branches: 4 },
  { viewport: { width: 1440, height: 900 } },
)
await generate(branches)
await shoot(branches, 'web-branches')

const asked = await open(
  { prompt: 'What is the capital of Australia?', decoder: 'enumerate', chat: true, threshold: 0.001, leaves: 8, coverage: 0.95, max_tokens: 24 },
  { viewport: { width: 1440, height: 760 } },
) // prettier-ignore
await asked.getByRole('button', { name: 'Ask', exact: true }).click()
await asked.locator('button.primary:enabled', { hasText: 'Ask' }).waitFor()
await asked.locator('.answers summary').first().click()
await shoot(asked, 'web-answers')

const blog = createServer((request, response) => {
  const file = { '/tempo-run.js': 'dist/tempo-run.js', '/story.json': 'public/example.json' }[request.url]
  response.end(file ? readFileSync(`${WEB}${file}`) : BLOG)
})
await new Promise((resolve) => blog.listen(0, '127.0.0.1', resolve))
const embedded = await openPage(browser, `http://127.0.0.1:${blog.address().port}/`, {
  viewport: { width: 900, height: 760 },
  deviceScaleFactor: 1.25,
})
await embedded.locator('.fork').nth(9).click()
await embedded.waitForTimeout(400)
await embedded.screenshot({ path: `${FOLDER}/web-embed.png` })
await closePage(embedded)
blog.close()

const phone = await openPage(browser, server.url, { viewport: { width: 380, height: 780 }, deviceScaleFactor: 2 })
await phone.locator('.fork').first().waitFor()
await shoot(phone, 'web-phone')

await browser.close()
await server.stop()
